"""The tokenizer: text is decoded unchanged, special tokens keep their ids, user text never becomes a special token."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from soli.data.tokenizer import SMALLEST_VOCAB, SPECIAL_TOKENS, Tokenizer, special_names
from soli.errors import SoliError

TEXTS = ["The cat sat on the mat in 2024.", "猫坐在垫子上，狗在外面。", "It's a translation: 翻译。"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 400)


def test_special_tokens_come_first_in_order(tokenizer):
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(16))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


@given(text=st.text(max_size=60))
def test_any_text_is_decoded_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(max_size=20), token=st.sampled_from(SPECIAL_TOKENS))
def test_special_tokens_in_text_stay_text(tokenizer, text, token):
    ids = tokenizer.encode(text + token)
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == text + token


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("abc猫abc 1984", ["abc", "猫", "abc", " ", "198", "4"]),
        ("don't stop!!\nx", ["don", "'t", " stop", "!!\n", "x"]),
        ("他说：“好。” OK", ["他说", "：“", "好", "。”", " OK"]),
        ("a  b", ["a", " ", " b"]),
    ],
)
def test_learnt_tokens_stay_within_deepseek_v3_s_pre_tokens(text, tokens):
    learnt = Tokenizer.train([text] * 50, 400)
    assert [learnt.token_text(index) for index in learnt.encode(text)] == tokens


def test_training_is_the_same_twice(tokenizer):
    again = Tokenizer.train(TEXTS, 400)
    assert [again.token_text(i) for i in range(400)] == [tokenizer.token_text(i) for i in range(400)]


def test_batches_encode_like_single_texts(tokenizer):
    assert tokenizer.encode_batch(TEXTS[:3]) == [tokenizer.encode(text) for text in TEXTS[:3]]


def test_saved_folder_reads_back_and_transformers_agrees(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    text = "The 猫 sat: It's 42!\n"
    assert again.encode(text) == tokenizer.encode(text)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


def test_bos_and_eos_follow_the_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = {"bos_token": {"content": "<|text|>"}, "eos_token": "<|pad|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = Tokenizer.from_folder(tmp_path)
    assert (named.bos_id, named.eos_id) == (5, 2)


def test_prompt_names_both_languages(tokenizer):
    body = tokenizer.encode("The cat")
    assert tokenizer.translation_prompt("The cat", "zh") == [0, 3, *body, 4]
    assert tokenizer.translation_prompt("The cat", "en") == [0, 4, *body, 3]


def test_errors_are_sentences(tokenizer, tmp_path):
    with pytest.raises(SoliError, match="choose en or zh"):
        tokenizer.translation_prompt("x", "fr")
    with pytest.raises(SoliError, match="no token <\\|nope\\|>"):
        tokenizer.token_id("<|nope|>")
    with pytest.raises(SoliError, match=f"at least {SMALLEST_VOCAB}"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(SoliError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SoliError, match=r"tokenizer\.json: not valid JSON"):
        Tokenizer.from_folder(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(SoliError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def bytes_folder(folder, post_processor=None, **config):
    """A folder with a tokenizer of 256 bytes, <b> (256) and <e> (257), and this tokenizer_config.json."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<b>", "<e>")])
    if post_processor is not None:
        backend.post_processor = post_processor
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<b>", "eos_token": "<e>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def template(single):
    return processors.TemplateProcessing(single=single, special_tokens=[("<b>", 256), ("<e>", 257)])


BYTE_LEVEL = processors.ByteLevel(trim_offsets=False)
POST_PROCESSORS = {
    "none": None,
    "byte level": BYTE_LEVEL,
    "bos": template("<b> $A"),
    "bos and eos": template("<b> $A <e>"),
    "bos twice": template("<b> <b> $A"),
    "a template that adds nothing": template("$A"),
    "byte level, then bos": processors.Sequence([BYTE_LEVEL, template("<b> $A")]),
    "roberta": processors.RobertaProcessing(("<e>", 257), ("<b>", 256)),
}
ADD_BOS = {"absent": {}, "null": {"add_bos_token": None}, "false": {"add_bos_token": False}}


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", None])
@pytest.mark.parametrize("add_bos", ADD_BOS)
@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
def test_a_text_is_surrounded_as_the_tokenizer_s_files_say(tmp_path, post_processor, add_bos, tokenizer_class):
    transformers = pytest.importorskip("transformers")
    config = ADD_BOS[add_bos] | {"tokenizer_class": tokenizer_class}
    bytes_folder(tmp_path, POST_PROCESSORS[post_processor], **config)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    prefix, suffix = Tokenizer.from_folder(tmp_path).text_affixes
    ids = Tokenizer.from_folder(tmp_path).encode("hi")
    assert [*prefix, *ids, *suffix] == transformers.AutoTokenizer.from_pretrained(tmp_path)("hi").input_ids


@pytest.mark.parametrize(
    ("post_processor", "config", "prefix"),
    [
        ("none", {"add_bos_token": True}, (256,)),
        ("byte level", {"add_bos_token": True}, (256,)),  # as DeepSeek-V3's
        ("bos", {"add_bos_token": True}, (256,)),
        ("a template that adds nothing", {"add_bos_token": True}, ()),
        ("none", {"add_bos_token": True, "bos_token": None}, ()),
        ("none", {"bos_token": None}, ()),
    ],
)
def test_add_bos_token_counts_where_no_template_decides(tmp_path, post_processor, config, prefix):
    bytes_folder(tmp_path, POST_PROCESSORS[post_processor], **config)
    assert Tokenizer.from_folder(tmp_path).text_affixes == (prefix, ())


def test_add_bos_token_must_be_a_truth_value(tmp_path):
    bytes_folder(tmp_path, add_bos_token="no")
    with pytest.raises(SoliError, match=r"tokenizer_config\.json: add_bos_token is 'no'; it must be true"):
        Tokenizer.from_folder(tmp_path)


ADDED = ("<｜User｜>", "<think>", "<｜fim▁hole｜>", "<|tool_call_begin|>")


@pytest.fixture(scope="module")
def with_added_tokens():
    """Tokens beside the vocabulary that are not special, as DeepSeek's are, and one that is white space."""
    backend = Tokenizer.train(TEXTS, 400)._backend
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in (*ADDED, "    ")])
    return Tokenizer(backend)


@given(text=st.text(max_size=20), token=st.sampled_from(ADDED + SPECIAL_TOKENS))
def test_every_added_token_in_text_stays_text(with_added_tokens, text, token):
    added = set(with_added_tokens.added_tokens().values()) - {with_added_tokens.token_id("    ")}
    ids = with_added_tokens.encode(text + token)
    assert not added & set(ids) and with_added_tokens.decode(ids) == text + token
    assert with_added_tokens.encode_batch([text + token]) == [ids]


def test_tokens_of_white_space_alone_are_ordinary_ones(with_added_tokens):
    assert with_added_tokens.token_id("    ") in with_added_tokens.encode("a    b")


def test_spelled_tokens_can_be_parsed_all_of_them(with_added_tokens):
    text = "<|bos|><｜User｜>a <think>b<|eos|>"
    ids = with_added_tokens.encode_spelled(text)
    spelled = [with_added_tokens.token_id(token) for token in ("<|bos|>", "<｜User｜>", "<think>", "<|eos|>")]
    assert [index for index in ids if index in with_added_tokens.added_tokens().values()] == spelled
    plain = Backend.from_str(with_added_tokens.to_json())
    for spelled_text in (text, "", "<think>", "no token", "<think><think> x <thi", "    <think>    y"):
        expected = plain.encode(spelled_text, add_special_tokens=False).ids
        assert with_added_tokens.encode_spelled(spelled_text) == expected


def test_a_tokenizer_is_written_with_the_marks_that_it_was_read_with(with_added_tokens, tmp_path):
    with_added_tokens.save(tmp_path)
    added = {token["content"]: token["special"] for token in json.loads(with_added_tokens.to_json())["added_tokens"]}
    assert not any(added[token] for token in ADDED) and all(added[token] for token in SPECIAL_TOKENS)
    again = Tokenizer.from_folder(tmp_path)
    assert again.to_json() == with_added_tokens.to_json()
    ids = [with_added_tokens.token_id(token) for token in (*ADDED, "<|eos|>")]
    assert again.decode(ids) == with_added_tokens.decode(ids) == "".join(ADDED)
    assert again.decode(ids, visible=ids) == "".join(ADDED) + "<|eos|>"


@pytest.mark.parametrize(
    ("config", "older", "expected"),
    [
        ({}, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, {"bos_token": "<s>", "eos_token": "</s>"}),
        ({"bos_token": "<b>"}, {"bos_token": "<s>", "cls_token": "<c>"}, {"bos_token": "<s>", "cls_token": "<c>"}),
        ({"bos_token": "<b>", "added_tokens_decoder": {}}, {"bos_token": "<s>"}, {"bos_token": "<b>"}),
        ({"added_tokens_decoder": {}}, {"bos_token": "<s>"}, {"bos_token": "<s>"}),
        ({"bos_token": None, "added_tokens_decoder": {}}, {"bos_token": "<s>"}, {}),
    ],
)
def test_names_of_special_tokens_may_be_in_a_file_of_their_own(config, older, expected, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    assert special_names(tmp_path / "tokenizer_config.json") == expected
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": 1}))
    with pytest.raises(SoliError, match=r"special_tokens_map\.json: bos_token is 1"):
        special_names(tmp_path / "tokenizer_config.json")
