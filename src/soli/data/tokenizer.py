"""Byte-level BPE over English and Chinese, with the special tokens that frame Soli's documents.

Every string has a token sequence and is decoded unchanged: the base alphabet is the 256 bytes. A new tokenizer splits
text as DeepSeek-V3's does, and a special token's name in a user's text stays text. Reads any folder with a
`tokenizer.json`, and Kimi's and Moonlight's `tiktoken.model`; rejects one that is missing or broken, and a translation
prompt without its tokens.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from soli.atomic_file import replace_file
from soli.data import tiktoken_model
from soli.data.tiktoken_model import SYMBOLS
from soli.errors import SoliError, library_errors
from soli.hub.cache import find_folder
from soli.input_files import TABLE_BYTES, kind_of, parse_json, read_object_if_present, read_text
from soli.sections import is_text, shown

# In the order of their ids, from 0.
SPECIAL_TOKENS = (
    "<|bos|>", "<|eos|>", "<|pad|>", "<|en|>", "<|zh|>", "<|text|>",
    "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
    "<|user|>", "<|assistant|>", "<|system|>",
    "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>",
)  # fmt: skip

TEXT_PREFIX = ("<|bos|>", "<|text|>")  # of Soli's own plain documents
SPECIAL_NAMES = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
MAX_VOCAB = 2**24  # ids of a tokenizer that is read
MAX_GROWTH = 64  # how many times longer normalizers, or decoders, may make a text; in practice up to 3
SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256

# DeepSeek-V3's pre-tokenization (its tokenizer.json; "deepseek-v3" in llama.cpp), applied one after another: what BPE
# never merges across are runs of up to three digits, runs of Chinese and kana, words, punctuation, line breaks, spaces.
PRE_TOKENS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)

# The byte of each of GPT-2's byte symbols.
_BYTE_OF = {symbol: byte for byte, symbol in SYMBOLS.items()}

LONG_TEXT = 4096  # characters from which `encode` lets other threads run


class TextTooLong(SoliError):
    """A text has more tokens than it may have; rejected before it is tokenized, so `fewest_tokens` is a lower bound."""

    def __init__(self, name: str, fewest_tokens: int, most: int) -> None:
        super().__init__(f"{name} has {fewest_tokens} tokens or more; at most {most} are possible here: shorten it")


class Tokenizer:
    """Text to ids and back, around a `tokenizers.Tokenizer`."""

    def __init__(
        self, backend: tokenizers.Tokenizer, bos: str = "<|bos|>", eos: str = "<|eos|>", add_bos: bool = False
    ) -> None:
        """`add_bos`: texts begin with bos where the backend's post-processor has no template that decides it."""
        backend.no_padding()
        backend.no_truncation()
        added_tokens = backend.get_added_tokens_decoder()
        self._special = {index for index, token in added_tokens.items() if token.special}
        # Text that spells an added token is encoded as text, as tokenizers does for those that are marked special.
        # White space alone delimits nothing: such tokens are ordinary ones.
        self._marked = [token for token in added_tokens.values() if not (token.special or token.content.isspace())]
        backend.add_special_tokens(
            [
                AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=True,
                )
                for token in self._marked
            ]
        )
        backend.encode_special_tokens = True
        self._backend = backend
        self._bos, self._eos, self._add_bos = bos, eos, add_bos

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Read `folder/tokenizer.json`, else its `tiktoken.model`, and bos and eos from `tokenizer_config.json`."""
        path = Path(folder) / "tokenizer.json"
        if os.path.lexists(path):
            backend = _read_backend(path)
        elif os.path.lexists(path.with_name(tiktoken_model.FILE)):
            backend = tiktoken_model.read_backend(Path(folder))
        else:
            raise SoliError(f"{folder} has no tokenizer.json: point to a model or data folder that holds one")
        config = path.with_name("tokenizer_config.json")
        names = special_names(config)
        add_bos = _adds_bos(config) and "bos_token" in names
        return cls(backend, names.get("bos_token") or "<|bos|>", names.get("eos_token") or "<|eos|>", add_bos)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn a byte-level BPE of `vocab_size` entries (special tokens and bytes counted) from texts."""
        if vocab_size < SMALLEST_VOCAB:
            raise SoliError(f"vocab_size is {vocab_size}: it must be at least {SMALLEST_VOCAB} (bytes, special tokens)")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENS),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(with_affixes(backend, [SPECIAL_TOKENS.index(token) for token in TEXT_PREFIX], []))

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and the `tokenizer_config.json` that transformers reads, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "tokenizer.json", self.to_json(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._bos,
            "eos_token": self._eos,
            "pad_token": "<|pad|>",
            "clean_up_tokenization_spaces": False,
        }
        replace_file(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens, added ones too, by their names."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def bos_id(self) -> int:
        return self.token_id(self._bos)

    @property
    def has_bos(self) -> bool:
        """Whether the folder names a bos token, or the tokenizer is Soli's own, and the vocabulary holds it."""
        return self.has_token(self._bos)

    @property
    def has_eos(self) -> bool:
        """`has_bos` of the eos token."""
        return self.has_token(self._eos)

    @property
    def eos_id(self) -> int:
        return self.token_id(self._eos)

    def token_id(self, token: str) -> int:
        """The id of one token by its name; an error when the vocabulary lacks it."""
        index = self._backend.token_to_id(token)
        if index is None:
            raise SoliError(f"this tokenizer has no token {token}: use a model whose tokenizer was built for the task")
        return int(index)

    def has_token(self, token: str) -> bool:
        """Whether the vocabulary holds this token, by its name."""
        return self._backend.token_to_id(token) is not None

    @cached_property
    def text_affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens before and after a text, as the tokenizer's own files say.

        A template in the post-processor decides; without one `add_bos_token`, where tokenizer_config.json has it; else
        there are none. Soli's own tokenizers, of which old ones have no template, begin with <|bos|><|text|>.
        """
        if not _has_template(self._backend.post_processor):
            if all(map(self.has_token, TEXT_PREFIX)):
                return tuple(map(self.token_id, TEXT_PREFIX)), ()
            return ((self.bos_id,) if self._add_bos else ()), ()
        with library_errors(_broken):
            encoding = self._backend.encode("a", add_special_tokens=True)
        if outside := [index for index in encoding.ids if index >= self.vocab_size]:
            raise _broken(f"its post_processor adds token {outside[0]}, but there are {self.vocab_size}")
        is_text = [not special for special in encoding.special_tokens_mask]
        first = is_text.index(True) if any(is_text) else len(is_text)
        return tuple(encoding.ids[:first]), tuple(encoding.ids[first + sum(is_text) :])

    def added_tokens(self) -> dict[str, int]:
        """Ids of the tokens added to the vocabulary, special or not, by name."""
        return {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}

    @cached_property
    def longest_token(self) -> int | None:
        """At most so many bytes of text become one token; None where a normalizer may shorten the text before."""
        if not self.byte_level or self._backend.normalizer is not None:
            return None
        if any(token.lstrip or token.rstrip for token in self._backend.get_added_tokens_decoder().values()):
            return None  # takes white space of any length with it
        return max(len(token.encode()) for token in self.vocabulary())

    def check_length(self, name: str, text_bytes: int, most: int) -> None:
        """TextTooLong for a text of so many bytes if it is certain to have more than `most` tokens."""
        if self.longest_token is not None and text_bytes > most * self.longest_token:
            raise TextTooLong(name, -(-text_bytes // self.longest_token), most)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without bos or eos."""
        if len(text) >= LONG_TEXT:
            return self.encode_batch([text])[0]  # unlike `encode` of the backend, releases the interpreter lock
        with library_errors(_broken):
            return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        with library_errors(_broken):
            return [list(item.ids) for item in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def encode_spelled(self, text: str) -> list[int]:
        """Ids of a text in which the names of added tokens are these tokens, as in a prompt that was rendered
        elsewhere or one for fill-in-the-middle; without bos or eos beside those spelled out."""
        texts: list[str] = []
        tokens: list[int] = []
        end = 0
        for match in self._spelled_token.finditer(text):
            texts.append(text[end : match.start()])
            tokens.append(self.token_id(match[0] if self.has_token(match[0]) else match[0].strip()))
            end = match.end()
        first, *others = self.encode_batch([*texts, text[end:]])
        return [*first, *(index for token, ids in zip(tokens, others, strict=True) for index in (token, *ids))]

    @cached_property
    def _spelled_token(self) -> re.Pattern[str]:
        """The added tokens, the longest first, with the white space that some take with them."""
        added = [token for token in self._backend.get_added_tokens_decoder().values() if not token.content.isspace()]
        spaces = {True: r"\s*", False: ""}
        patterns = [spaces[token.lstrip] + re.escape(token.content) + spaces[token.rstrip] for token in added]
        return re.compile("|".join(sorted(patterns, key=len, reverse=True)) or r"(?!)")

    def decode(self, ids: Iterable[int], visible: Collection[int] = ()) -> str:
        """Text of ids; special tokens are omitted but for `visible` ones, broken UTF-8 shows as U+FFFD."""
        hidden = self._special.difference(visible) if visible else self._special
        with library_errors(_broken):
            return str(self._backend.decode([i for i in map(int, ids) if i not in hidden], skip_special_tokens=False))

    def token_text(self, index: int) -> str:
        """One token as a person reads it: special tokens by name, partial characters as U+FFFD."""
        with library_errors(_broken):
            return str(self._backend.decode([int(index)], skip_special_tokens=False))

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes of a token, which may end inside a character; none for an unknown id."""
        symbols = self._backend.id_to_token(int(index)) or ""
        if all(symbol in _BYTE_OF for symbol in symbols):
            return bytes(_BYTE_OF[symbol] for symbol in symbols)
        return self.token_text(index).encode()

    def to_json(self, pretty: bool = False) -> str:
        """The content of a `tokenizer.json`."""
        text = str(self._backend.to_str(pretty=pretty))
        if not self._marked:
            return text
        document = json.loads(text)
        marked = {token.content for token in self._marked}
        for token in document["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in marked
        return json.dumps(document, ensure_ascii=False, indent=2 if pretty else None)

    @property
    def has_template(self) -> bool:
        """Whether `to_json` says by itself which tokens surround a text, so that other readers need no other file."""
        return _has_template(self._backend.post_processor) or self.text_affixes == ((), ())

    def to_json_with_template(self) -> str:
        """`to_json` with a post-processor that puts around a text what Soli does, for readers that go by it alone."""
        if self.has_template:
            return self.to_json()
        prefix, suffix = self.text_affixes
        return str(with_affixes(tokenizers.Tokenizer.from_str(self.to_json()), prefix, suffix).to_str())

    @property
    def byte_level(self) -> bool:
        """Whether decoding is `text_bytes` of token after token, joined and read as UTF-8."""
        return isinstance(self._backend.decoder, decoders.ByteLevel)

    def text_bytes(self, index: int, visible: Collection[int] = ()) -> bytes:
        """What a token adds to `decode`'s text: its bytes, or none for a special token that is not `visible`."""
        return b"" if index in self._special and index not in visible else self.token_bytes(index)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no part of a text."""
        return frozenset(self._special)

    def translation_prompt(self, text: str, to: str) -> list[int]:
        """`<|bos|><|en|>text<|zh|>` for `to="zh"`, the mirror image for `to="en"`."""
        if to not in ("en", "zh"):
            raise SoliError(f"cannot translate to {to!r}: choose en or zh")
        source, target = ("en", "zh") if to == "zh" else ("zh", "en")
        return [self.bos_id, self.token_id(f"<|{source}|>"), *self.encode(text), self.token_id(f"<|{target}|>")]


def tokenizer_folder(name: str) -> Path:
    """The folder of the bundled model for `nano`, else the folder of that name, or of a downloaded model's ID."""
    if name == "nano":
        return Path(__file__).resolve().parents[1] / "models" / "nano"
    return Path(name) if Path(name).exists() else find_folder(name, config_only=True) or Path(name)


def with_affixes(backend: tokenizers.Tokenizer, prefix: Sequence[int], suffix: Sequence[int]) -> tokenizers.Tokenizer:
    """The backend itself, with a post-processor that puts these tokens around a text; other post-processing stays."""
    names = {index: backend.id_to_token(index) for index in (*prefix, *suffix)}
    single = [*(names[index] for index in prefix), "$A", *(names[index] for index in suffix)]
    template = processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=[(name, index) for index, name in names.items()]
    )
    former = backend.post_processor
    backend.post_processor = template if former is None else processors.Sequence([former, template])
    return backend


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokenizer.json`, checked before the library reads it."""
    text = read_text(path, TABLE_BYTES)
    document = parse_json(text, str(path))
    _check_vocabulary(path, document)
    _check_growth(path, document)
    with library_errors(
        lambda reason: SoliError(f"{path} is not a readable tokenizer ({reason}): fetch or build it again")
    ):
        return tokenizers.Tokenizer.from_str(text)


def special_names(path: Path) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, each a string there or {"content": string}, by field.

    special_tokens_map.json beside it has those that are absent there; in a folder of the older form, whose
    configuration does not list the added tokens, it has precedence, as in transformers.
    """
    config, older = path, path.with_name("special_tokens_map.json")
    names = _names_in(config)
    other_names = _names_in(older)
    if "added_tokens_decoder" in read_object_if_present(config):
        other_names, names = names, other_names
    merged = names | other_names
    return {key: name for key, name in merged.items() if name is not None}


def _names_in(path: Path) -> dict[str, str | None]:
    document = read_object_if_present(path)
    names: dict[str, str | None] = {}
    for key in SPECIAL_NAMES & document.keys():
        value = document[key]
        name = value.get("content") if isinstance(value, dict) else value
        if value is not None and not is_text(name):
            raise SoliError(f'{path}: {key} is {shown(value)}; it must be text, an object {{"content": text}}, or null')
        names[key] = name
    return names


def _adds_bos(path: Path) -> bool:
    """`add_bos_token` of a tokenizer_config.json; an absent one and null are false."""
    value = read_object_if_present(path).get("add_bos_token")
    if value is not None and not isinstance(value, bool):
        raise SoliError(f"{path}: add_bos_token is {shown(value)}; it must be true, false or null")
    return bool(value)


def _has_template(post_processor: Any) -> bool:
    """Whether a post-processor decides which tokens surround a text; ByteLevel only moves offsets."""
    if post_processor is None:
        return False
    state = json.loads(post_processor.__getstate__())
    return any(part["type"] != "ByteLevel" for part in state.get("processors", [state]))


def _broken(reason: str) -> SoliError:
    return SoliError(f"this model's tokenizer.json fails on a text ({reason}): fetch or build it again")


def _check_vocabulary(path: Path, document: Any) -> None:
    """SoliError for ids that the tokenizers library would take and fail on, or allocate memory for, later."""
    if not isinstance(document, dict):
        raise SoliError(f"{path}: must hold a JSON object, not {kind_of(document)}")
    model, added = document.get("model"), document.get("added_tokens")
    if added is not None and not isinstance(added, list):
        raise SoliError(f"{path}: added_tokens is {shown(added)}; it must be a list of objects")
    vocabulary = model.get("vocab", {}) if isinstance(model, dict) else {}
    ids = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    ids += [("added_tokens", token.get("id")) for token in added or () if isinstance(token, dict)]
    for token, index in ids:
        if type(index) is not int or not 0 <= index < MAX_VOCAB:
            raise SoliError(f"{path}: the id of {token!r} is {shown(index)}; it must be from 0 to {MAX_VOCAB - 1:,}")


def _check_growth(path: Path, document: dict[str, Any]) -> None:
    """SoliError for replacements, one after another, that may make gigabytes of a short text."""
    for field in ("normalizer", "pre_tokenizer", "decoder"):
        growth = _growth(document.get(field))
        if growth > MAX_GROWTH:
            raise SoliError(
                f"{path}: {field} may make a text {growth:,} times longer; at most {MAX_GROWTH} times is possible here"
            )


def _growth(step: Any) -> int:
    """How many times longer a text may become in a step of a tokenizer and in the steps within it."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1
    own = max((len(step[name]) for name in ("content", "prepend") if isinstance(step.get(name), str)), default=1)
    return max(1, own) * math.prod(_growth(item) for item in step.values() if isinstance(item, list))
