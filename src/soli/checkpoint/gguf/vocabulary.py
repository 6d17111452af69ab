"""A tokenizer as llama.cpp has it: tokens with their types, merges, and the name of the pre-tokenizer.

llama.cpp does not read a tokenizer's pattern; it has those of known families, by name. Only tokenizers with the pattern
of one of these are converted, any other is rejected by name: with a similar pattern the model would read other tokens
than it was trained on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from soli.data import tiktoken_model
from soli.data.tokenizer import PRE_TOKENS, Tokenizer
from soli.errors import SoliError
from soli.sections import shown

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens

KIMI: Final = "kimi-k2"

# The patterns that split text one after another, and llama.cpp's name of a pre-tokenizer that splits alike.
PRE_TOKENIZERS: Final[dict[tuple[str, ...], str]] = {
    PRE_TOKENS: "deepseek-v3",
    (tiktoken_model.PATTERN,): KIMI,
}
KIMI_NOTE: Final = (
    "llama.cpp splits rare texts otherwise than Kimi's pattern: 〇 before digits, and contractions after some marks"
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types, merges in symbols, pre-tokenizer, and whether texts begin with bos and end with
    eos. `notes`: what the file cannot say."""

    pre_tokenizer: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    bos: int | None
    eos: int | None
    add_bos: bool
    add_eos: bool
    notes: Sequence[str]


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a folder's tokenizer, filled up to the model's `size`. SoliError for a tokenizer that llama.cpp
    has no pre-tokenizer for."""
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > size:
        raise SoliError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is {size}: they do "
            "not belong together"
        )
    document = json.loads(tokenizer.to_json())
    model = document["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    added = {token["id"]: token for token in document.get("added_tokens") or ()}
    names = {index: token for token, index in model["vocab"].items()} if isinstance(model.get("vocab"), dict) else {}
    names |= {index: token["content"] for index, token in added.items()}
    prefix, suffix = tokenizer.text_affixes
    bos = tokenizer.bos_id if tokenizer.has_bos else None
    eos = tokenizer.eos_id if tokenizer.has_eos else None
    notes = _affix_notes(tokenizer, prefix, suffix, bos, eos)
    if model.get("ignore_merges") and len(merges) + 256 < len(model["vocab"]):
        unmerged = len(model["vocab"]) - 256 - len(merges)
        notes.append(f"llama.cpp will not use {unmerged:,} tokens that no merges lead to")
    pre_tokenizer = _pre_tokenizer(folder, document)
    if pre_tokenizer == KIMI:
        notes.append(KIMI_NOTE)
    return Vocabulary(
        pre_tokenizer=pre_tokenizer,
        tokens=[names.get(index, f"[PAD{index}]") for index in range(size)],
        types=[_type(index, names, added) for index in range(size)],
        merges=merges,
        bos=bos,
        eos=eos,
        add_bos=bos is not None and prefix[:1] == (bos,),
        add_eos=eos is not None and suffix == (eos,),
        notes=notes,
    )


def _affix_notes(
    tokenizer: Tokenizer, prefix: Sequence[int], suffix: Sequence[int], bos: int | None, eos: int | None
) -> list[str]:
    rest = [*(prefix[1:] if prefix[:1] == (bos,) else prefix), *(() if suffix == (eos,) else suffix)]
    if not rest:
        return []
    names = "".join(map(tokenizer.token_text, rest))
    return [f"llama.cpp puts only bos and eos around a text by itself; write {names} into a text prompt as well"]


def _type(index: int, names: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if index not in names:
        return UNUSED
    if index not in added:
        return NORMAL
    # differs: llama.cpp finds a USER_DEFINED token in any text, where Soli keeps its name as text; as CONTROL it would
    # not be shown in answers, which tool calls need.
    return CONTROL if added[index]["special"] else USER_DEFINED


def _pre_tokenizer(folder: Path, document: Mapping[str, Any]) -> str:
    """llama.cpp's name of the tokenizer's pre-tokenizer; SoliError naming what it has no name for."""
    steps = document.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    *splits, last = steps or [{}]
    patterns = tuple(_pattern(step) for step in splits)
    is_byte_level = last.get("type") == "ByteLevel" and not (last.get("use_regex") or last.get("add_prefix_space"))
    model = document["model"]
    is_plain = document.get("normalizer") is None and model.get("type") == "BPE" and not model.get("byte_fallback")
    name = PRE_TOKENIZERS.get(patterns) if is_byte_level and is_plain else None
    if name is None:
        steps_by_text = [pattern or shown(step) for pattern, step in zip(patterns, splits, strict=True)]
        what = " then ".join(steps_by_text) or shown(last)
        raise SoliError(
            f"{folder}: llama.cpp has no pre-tokenizer that splits text as this tokenizer does, by {what[:200]}; "
            f"Soli knows those equal to llama.cpp's {', '.join(PRE_TOKENIZERS.values())}"
        )
    return name


def _pattern(step: Mapping[str, Any]) -> str:
    """The pattern of a step that isolates its matches, line breaks as escapes; empty for any other step."""
    pattern = step.get("pattern")
    text = pattern.get("Regex") if isinstance(pattern, dict) else None
    if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert") or text is None:
        return ""
    return str(text).replace("\r", r"\r").replace("\n", r"\n")
