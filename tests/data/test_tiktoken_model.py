"""`tiktoken.model`: the same tokens as the tiktoken library with the family's pattern, and damage in one sentence."""

import base64
import json
import random
from functools import cache
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from soli.data.tiktoken_model import ALTERNATIVES, PATTERN, SYMBOLS, read_ranks
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError

WORDS = (
    "the cat's", "", "sat", "ON THE MAT,", "They'LL", "say:", "'don't'!", "Straße", "12345", "中文", "漢字", "我们的",
    "ñandú", "привет", "İzmir", "(a+b)\n\n\t", "x=1;",
)  # fmt: skip
BYTE_OF = {symbol: byte for byte, symbol in SYMBOLS.items()}
# Tokens that no merges lead to: they are used where the pattern splits off exactly them.
WHOLE = (" qzjxw", "中文漢字我", "ZQXJ", "...---...", "\n\n\n\n\n\n")
MOONLIGHT = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
}


@cache
def ranks() -> dict[bytes, int]:
    """A vocabulary learnt with the family's pattern: 256 bytes, 900 merges and WHOLE."""
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=1156, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    rng = random.Random(1)
    backend.train_from_iterator((" ".join(rng.choices(WORDS, k=40)) for _ in range(500)), trainer)
    symbols = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    tokens = [bytes(BYTE_OF[symbol] for symbol in token) for token in symbols]
    tokens += [text.encode() for text in WHOLE if text.encode() not in tokens]
    return {token: rank for rank, token in enumerate(tokens)}


def encoding() -> tiktoken.Encoding:
    return tiktoken.Encoding("test", pat_str="|".join(ALTERNATIVES), mergeable_ranks=ranks(), special_tokens={})


def lines() -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks().items()]


def folder(path: Path, config: dict | None = None, model: dict | None = None, text: str | None = None) -> Path:
    (path / "tiktoken.model").write_text("\n".join(lines()) + "\n" if text is None else text)
    (path / "tokenizer_config.json").write_text(json.dumps(MOONLIGHT if config is None else config))
    (path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"} if model is None else model))
    return path


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of every plane, of the classes that the pattern tells apart, and of the vocabulary's own words."""
    rng = random.Random(seed)

    def any_character() -> str:
        code = rng.choice((rng.randrange(0x110000), rng.randrange(0x3000), rng.randrange(128)))
        return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"

    kinds = (
        any_character,
        lambda: chr(rng.randrange(0x4E00, 0x9FA6)),
        lambda: rng.choice("々〇⼀㐀𠀀ーあア豈"),
        lambda: rng.choice("aZéÉßǅʰªⅠ१٣²́̈҈ⓐÅſ"),
        lambda: rng.choice(("'s", "'S", "'ſ", "'T", "'re", "'VE", "'ll", "'LL", "'d", "’s", "'")),
        lambda: rng.choice((" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\u200b")),
        lambda: rng.choice("0123456789") * rng.randrange(1, 5),
        lambda: rng.choice("!?.,;:()[]{}<>|/\\-_=+*&^%$#@~`\"。，「」…—€𝄞😀"),
        lambda: rng.choice((*WORDS, *WHOLE)),
    )
    return ["".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 40))) for _ in range(count)]


def test_a_thousand_random_texts_are_encoded_as_tiktoken_does(tmp_path: Path) -> None:
    tokenizer, theirs = Tokenizer.from_folder(folder(tmp_path)), encoding()
    for text in random_texts(1000, 0):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode_ordinary(text), ascii(text)
        assert tokenizer.decode(ids) == text
    assert any(theirs.encode_ordinary(text) == [ranks()[text.encode()]] for text in WHOLE)


@pytest.mark.slow
def test_both_engines_split_every_character_alike(tmp_path: Path) -> None:
    """Their Unicode tables may differ in age: each character alone, and between letters, digits and Han."""
    tokenizer, theirs = Tokenizer.from_folder(folder(tmp_path)), encoding()
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            text = f"{chr(code)} a{chr(code)}A 1{chr(code)}'s中{chr(code)}\n"
            assert tokenizer.encode(text) == theirs.encode_ordinary(text), hex(code)


def added(first: int, **tokens: dict) -> dict:
    return {"added_tokens_decoder": {str(first + int(key[1:])): value for key, value in tokens.items()}}


def test_added_tokens_have_their_ids_and_are_special_or_not(tmp_path: Path) -> None:
    first = len(ranks())
    table = added(
        first,
        _0={"content": "[BOS]", "special": True},
        _1={"content": "[EOS]", "special": True},
        _5={"content": "<|tool_call_begin|>", "special": False},
    )
    config = MOONLIGHT | table | {"bos_token": "[BOS]", "eos_token": "[EOS]", "add_bos_token": True}
    tokenizer = Tokenizer.from_folder(folder(tmp_path, config))
    assert tokenizer.vocab_size == first + 6
    assert (tokenizer.bos_id, tokenizer.eos_id) == (first, first + 1)
    assert tokenizer.text_affixes == ((first,), ())
    assert tokenizer.token_text(first + 3) == f"<|reserved_token_{first + 3}|>"
    for text in ("a<|tool_call_begin|>b", "[BOS]hi"):  # the name of an added token in a text stays text
        assert tokenizer.encode(text) == encoding().encode_ordinary(text)
    assert tokenizer.decode([first, *tokenizer.encode("hi"), first + 5]) == "hi<|tool_call_begin|>"


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({}, {"model_type": "kimi_k2"}),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"model_type": "kimi_k2"}),
        ({"tokenizer_class": "TikTokenTokenizer"}, {"model_type": "deepseek_v3"}),
        (MOONLIGHT, {"model_type": "deepseek_v3"}),
        ({"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}, {}),
        ({"auto_map": ["moonshotai/Kimi-K2-Instruct--tokenization_kimi.TikTokenTokenizer", None]}, {}),
    ],
    ids=str,
)
def test_folders_of_the_family_are_read(tmp_path: Path, config: dict, model: dict) -> None:
    assert Tokenizer.from_folder(folder(tmp_path, config, model)).encode("中文ok") == encoding().encode("中文ok")


@pytest.mark.parametrize(
    ("config", "model", "words"),
    [
        ({}, {"model_type": "deepseek_v3"}, "deepseek_v3"),
        ({"tokenizer_class": "QWenTokenizer"}, {}, "QWenTokenizer"),
        ({"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}, {}, "tokenization_qwen"),
        ({"auto_map": {"AutoTokenizer": ["other.TikTokenTokenizer", None]}}, {"model_type": "kimi_k2"}, "other"),
    ],
    ids=str,
)
def test_the_pattern_of_another_family_is_not_guessed(tmp_path: Path, config: dict, model: dict, words: str) -> None:
    with pytest.raises(SoliError, match=rf"tiktoken\.model: .*{words}.*add a tokenizer\.json"):
        Tokenizer.from_folder(folder(tmp_path, config, model))


def test_the_python_file_is_compared_and_never_run(tmp_path: Path) -> None:
    path = folder(tmp_path)
    file = path / "tokenization_moonshot.py"
    pattern = ",".join(f'r"""{part}"""' for part in ALTERNATIVES)
    file.write_text(f"raise SystemExit\npat_str = '|'.join([{pattern}])")
    assert Tokenizer.from_folder(path).encode("ok")
    file.write_text(file.read_text().replace(r"\p{N}{1,3}", r"\p{N}"))
    with pytest.raises(SoliError, match="tokenization_moonshot"):
        Tokenizer.from_folder(path)


A, B = base64.b64encode(b"a").decode(), base64.b64encode(b"ab").decode()
BYTES = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
DAMAGE = {
    "bad base64": ([*BYTES, "a$b= 256"], r"line 257: the token b'a\$b=' is not valid base64"),
    "cut base64": ([*BYTES, "YWI 256"], "line 257: .*not valid base64"),
    "no rank": ([*BYTES, B], "line 257: must be a token in base64 and its rank"),
    "three fields": ([*BYTES, f"{B} 256 1"], "line 257: must be"),
    "a rank twice": ([*BYTES, f"{B} 255"], "line 257: the rank 255 is given twice"),
    "a token twice": ([*BYTES, f"{A} 256"], "the token b'a' has two ranks"),
    "a gap": ([*BYTES, f"{B} 257"], "the rank 256 is missing"),
    "a negative rank": ([*BYTES, f"{B} -1"], r"the rank is b'-1'; it must be from 0"),
    "a huge rank": ([*BYTES, f"{B} {10**30}"], "it must be from 0 to"),
    "a float": ([*BYTES, f"{B} 1.5"], "it must be from 0 to"),
    "an empty token": ([*BYTES, "== 256"], "line 257"),
    "a long token": ([*BYTES, base64.b64encode(b"x" * 300).decode() + " 256"], "has 300 bytes"),
    "a byte without token": (BYTES[:255], "the byte 0xff is no token"),
    "nothing": ([], "the byte 0x00 is no token"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_sentence(tmp_path: Path, name: str) -> None:
    content, words = DAMAGE[name]
    folder(tmp_path, text="\n".join(content))
    with pytest.raises(SoliError, match=rf"tiktoken\.model.*{words}") as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (folder(tmp_path) / "tiktoken.model").open("r+b") as stream:
        stream.truncate(10**9)
    with pytest.raises(SoliError, match=r"tiktoken\.model: is 1,000,000,000 bytes long"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], None),
        ({}, None),
        (None, None),
        ([1], "an object of tokens by id"),
        ({"x": {"content": "[BOS]"}}, "the id 'x'"),
        ({"5": {"content": "[BOS]"}}, "the id '5'"),
        ({"999999999": {"content": "[BOS]"}}, "the id '999999999'"),
        ({"1200": {"content": ""}}, "a text as its content"),
        ({"1200": {"content": "[A]", "special": "yes"}}, "must be true or false"),
        ({"1200": {"content": "[A]"}, "1201": {"content": "[A]"}}, "'\\[A\\]' twice"),
        ({"1200": {"content": "a"}}, "'a' is spelled like one of its tokens"),
    ],
    ids=str,
)
def test_added_tokens_are_checked(tmp_path: Path, table: object, words: str | None) -> None:
    folder(tmp_path, MOONLIGHT | {"added_tokens_decoder": table})
    if words is None:
        assert Tokenizer.from_folder(tmp_path).vocab_size == len(ranks())
    else:
        with pytest.raises(SoliError, match=words):
            Tokenizer.from_folder(tmp_path)


def test_order_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    shuffled = lines()
    random.Random(0).shuffle(shuffled)
    assert read_ranks(folder(tmp_path, text="\n\n".join(shuffled) + "\r\n") / "tiktoken.model") == ranks()
