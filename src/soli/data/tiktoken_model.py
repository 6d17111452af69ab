"""`tiktoken.model`, the vocabulary of Moonlight and Kimi K2, as a byte-level BPE of the tokenizers library.

The file holds one token a line, its bytes in base64 and its rank, which is its id; BPE merges the neighbours whose
joined bytes have the lowest rank. Neither merges nor the pattern that splits a text before are in it. Merges follow
from the ranks: a token's own merge joins the two parts that the merges of lower rank leave of its bytes. The pattern is
in a Python file of the folder, which is never run; Soli knows that of Moonlight and Kimi, and rejects any other family.

Added tokens, special or not, are those of tokenizer_config.json, each with its id.
"""

import base64
import binascii
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from soli.errors import SoliError
from soli.input_files import read_bytes, read_object_if_present, read_text
from soli.sections import is_text, shown

FILE: Final = "tiktoken.model"
FILE_BYTES: Final = 16 * 2**20  # Kimi's 163,584 tokens take 2.8 MB
MAX_TOKENS: Final = 2**20
MAX_ADDED: Final = 2**16
LONGEST_TOKEN: Final = 256  # bytes; finding the merges of a token takes quadratic time

# Kimi's and Moonlight's pattern (tokenization_kimi.py and tokenization_moonshot.py, the same in both): runs of Han
# characters; words of upper, then lower case letters without Han, with one other character before and an English
# contraction after; up to three digits; punctuation; line breaks; spaces.
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
ALTERNATIVES: Final = (
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
PATTERN: Final = "|".join(ALTERNATIVES)

MODEL_TYPES: Final = ("kimi_k2", "kimi_k25")
MODULES: Final = ("tokenization_kimi", "tokenization_moonshot")  # whose class is TikTokenTokenizer
CLASS: Final = "TikTokenTokenizer"

# GPT-2's symbol for each byte, as vocabularies of the tokenizers library write them.
_PRINTABLE: Final = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS: Final = [byte for byte in range(256) if byte not in _PRINTABLE]
SYMBOLS: Final = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder with a `tiktoken.model`; SoliError for an unknown family or a damaged file."""
    config = read_object_if_present(folder / "tokenizer_config.json")
    _check_family(folder, config)
    ranks = read_ranks(folder / FILE)
    added = _added_tokens(folder / "tokenizer_config.json", config, len(ranks))
    vocabulary = {_symbols(token): rank for token, rank in ranks.items()}
    # What the pattern splits off and is a token as a whole is that token, even where no merges lead to it.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges(ranks), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    for is_special, tokens in groupby(added, key=lambda token: token.special):  # ids follow from the order
        (backend.add_special_tokens if is_special else backend.add_tokens)(list(tokens))
    if backend.get_vocab_size(with_added_tokens=True) < len(ranks) + len(added):
        content = next(token.content for token in added if token.content in vocabulary)
        raise SoliError(f"{folder / FILE}: the added token {content!r} is spelled like one of its tokens")
    return backend


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a `tiktoken.model` with their ranks, lowest first; SoliError naming the line that is wrong."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(read_bytes(path, FILE_BYTES).splitlines(), 1):
        if not line.strip():
            continue
        token, rank = _read_line(f"{path}, line {number}", line)
        if rank in tokens:
            raise SoliError(f"{path}, line {number}: the rank {rank} is given twice; fetch the file again")
        tokens[rank] = token
    ranks = {tokens[rank]: rank for rank in sorted(tokens)}
    gap = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if gap is not None:
        raise SoliError(f"{path}: the rank {gap} is missing; fetch the file again")
    if len(ranks) < len(tokens):
        twice = next(token for rank, token in sorted(tokens.items()) if ranks[token] != rank)
        raise SoliError(f"{path}: the token {twice!r} has two ranks; fetch the file again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise SoliError(f"{path}: the byte 0x{missing[0]:02x} is no token, so not every text has tokens")
    return ranks


def _read_line(where: str, line: bytes) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2:
        raise SoliError(f"{where}: must be a token in base64 and its rank; fetch the file again")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error:
        raise SoliError(f"{where}: the token {shown(fields[0])} is not valid base64; fetch the file again") from None
    if not 0 < len(token) <= LONGEST_TOKEN:
        raise SoliError(f"{where}: the token has {len(token)} bytes; it must have 1 to {LONGEST_TOKEN}")
    if not fields[1].isdigit() or len(fields[1]) > 9 or int(fields[1]) >= MAX_TOKENS:
        raise SoliError(f"{where}: the rank is {shown(fields[1])}; it must be from 0 to {MAX_TOKENS - 1:,}")
    return token, int(fields[1])


def merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """The merge of each token that merges lead to, in the order of ranks, in symbols."""
    pairs: list[tuple[str, str]] = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _parts(token, rank, ranks)
            if len(parts) == 2:
                pairs.append((_symbols(parts[0]), _symbols(parts[1])))
    return pairs


def _parts(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What the merges of a lower rank leave of a token's bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    joined = [ranks.get(token[i : i + 2], rank) for i in range(len(token) - 1)]  # rank of each part with the next
    while joined:
        lowest = min(joined)
        if lowest >= rank:
            break
        i = joined.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del joined[i]
        if i < len(joined):
            joined[i] = ranks.get(parts[i] + parts[i + 1], rank)
        if i > 0:
            joined[i - 1] = ranks.get(parts[i - 1] + parts[i], rank)
    return parts


def _symbols(token: bytes) -> str:
    return "".join([SYMBOLS[byte] for byte in token])


def _added_tokens(path: Path, config: Mapping[str, Any], first: int) -> list[AddedToken]:
    """`added_tokens_decoder` in the order of ids, from `first`; ids between that it leaves out are reserved tokens."""
    table = config.get("added_tokens_decoder") or {}
    if not isinstance(table, Mapping):
        raise SoliError(f"{path}: added_tokens_decoder is {shown(table)}; it must be an object of tokens by id")
    named = dict(_added_token(path, key, value, first) for key, value in table.items())
    contents = [token.content for token in named.values()]
    if len(set(contents)) < len(contents):
        twice = next(content for content in contents if contents.count(content) > 1)
        raise SoliError(f"{path}: added_tokens_decoder has the token {twice!r} twice")
    ids = range(first, max(named, default=first - 1) + 1)
    return [named.get(index) or _reserved_token(index) for index in ids]


def _reserved_token(index: int) -> AddedToken:
    return AddedToken(f"<|reserved_token_{index}|>", special=True, normalized=False)


def _added_token(path: Path, key: str, value: Any, first: int) -> tuple[int, AddedToken]:
    if not (key.isascii() and key.isdigit() and len(key) <= 9 and first <= int(key) < first + MAX_ADDED):
        raise SoliError(
            f"{path}: added_tokens_decoder has the id {shown(key)}; it must be from {first}, behind the tokens of "
            f"{FILE}, to {first + MAX_ADDED - 1}"
        )
    fields = value if isinstance(value, Mapping) else {"content": value}
    content = fields.get("content")
    if not is_text(content) or not content:
        raise SoliError(f"{path}: added_tokens_decoder.{key} is {shown(value)}; it must have a text as its content")
    flags = {name: fields.get(name) or False for name in ("lstrip", "rstrip", "single_word", "special")}
    if any(type(flag) is not bool for flag in flags.values()):
        raise SoliError(f"{path}: added_tokens_decoder.{key} is {shown(value)}; its flags must be true or false")
    return int(key), AddedToken(content, normalized=False, **flags)


def _check_family(folder: Path, config: Mapping[str, Any]) -> None:
    """SoliError unless the folder is of Moonlight's or Kimi's family, by its Python file, its class or model_type."""
    auto_map = config.get("auto_map")
    entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, Mapping) else auto_map
    reference = entry[0] if isinstance(entry, list) and entry else entry
    model_type = read_object_if_present(folder / "config.json").get("model_type")
    if isinstance(reference, str) and reference:
        module, _, name = reference.rpartition("--")[2].rpartition(".")
        family = f"its tokenizer is {shown(reference)}"
        is_known = module in MODULES and name == CLASS and _has_pattern(folder / f"{module}.py")
    else:
        tokenizer_class = config.get("tokenizer_class")
        family = f"its tokenizer_class is {shown(tokenizer_class)} and its model_type {shown(model_type)}"
        is_known = tokenizer_class == CLASS or model_type in MODEL_TYPES
    if not is_known:
        raise SoliError(
            f"{folder / FILE}: holds no pattern to split text, and Soli knows only that of Kimi K2 and Moonlight, but "
            f"{family}: add a tokenizer.json to the folder"
        )


def _has_pattern(file: Path) -> bool:
    """Whether the folder's Python file, read as text and never run, has the known pattern, if it has one."""
    text = read_text(file) if file.exists() else ""
    return "pat_str" not in text or all(alternative in text for alternative in ALTERNATIVES)
