"""Packed tokens on disk: documents end to end in flat files of little-endian integers, with a meta.json beside.

Integers are 16 bits wide, or 32 where a vocabulary needs more. What training reads from them, and in which order, is in
src/soli/train/batches.py. Rejects files that do not match their meta.json. `inspect_folder` says what a folder holds:
tokens by source, characters per token, document lengths, samples.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from soli.data.tokenizer import Tokenizer
from soli.data.tsv import read_tsv
from soli.errors import SoliError
from soli.input_files import read_object
from soli.mapped_files import name_files_that_shrink
from soli.sections import NonNegativeInt, PositiveInt, Share, convert

DTYPE = np.dtype("<u2")
DTYPE_32 = np.dtype("<u4")
SEGMENT_TOKENS = ("<|en|>", "<|zh|>", "<|text|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_MEASURED_PAIRS = 2000
_SCANNED_TOKENS = 50_000_000

Totals = dict[str, dict[str, int]]  # `tokens` and `documents` by source

Counts = dict[str, dict[str, NonNegativeInt]]
META_FIELDS: dict[str, Any] = {
    "dtype": Literal["uint16", "uint32"],
    "vocab_size": PositiveInt,
    "train_tokens": NonNegativeInt,
    "valid_tokens": NonNegativeInt,
    "sources": Counts,
    "valid_sources": Counts,
    "seed": int,
    "fim_rate": Share,
    "tokenizer_sha256": str,
}
REQUIRED_META = ("dtype", "train_tokens", "valid_tokens")


def dtype_for(vocab_size: int) -> np.dtype:
    """The integers that hold ids below `vocab_size`."""
    return DTYPE if vocab_size <= 1 << 16 else DTYPE_32


class TokenWriter:
    """Documents appended to a file of tokens, renamed into place when the `with` block ends without an error."""

    def __init__(self, path: Path, dtype: np.dtype = DTYPE) -> None:
        self.totals: Totals = {}
        self.tokens = 0
        self._path, self._partial, self._dtype = path, path.with_suffix(".partial"), dtype

    def __enter__(self) -> Self:
        self._file = self._partial.open("wb")
        return self

    def write(self, source: str, ids: Sequence[int] | np.ndarray) -> None:
        self._file.write(np.asarray(ids, dtype=self._dtype).tobytes())
        row = self.totals.setdefault(source, {"tokens": 0, "documents": 0})
        row["tokens"] += len(ids)
        row["documents"] += 1
        self.tokens += len(ids)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._file.close()
        if error is None:
            self._partial.replace(self._path)


def write_tokens(
    path: Path, documents: Iterable[tuple[str, Sequence[int] | np.ndarray]], dtype: np.dtype = DTYPE
) -> Totals:
    """Write (source, ids) documents end to end; tokens and documents by source. Renamed into place when complete."""
    with TokenWriter(path, dtype) as writer:
        for source, ids in documents:
            writer.write(source, ids)
    return writer.totals


def write_meta(
    folder: Path,
    vocab_size: int,
    seed: int,
    train: Totals,
    valid: Totals,
    fim_rate: float,
    dtype: np.dtype = DTYPE,
) -> None:
    """meta.json of a folder whose train.bin, valid.bin and tokenizer.json are in place."""
    meta = {
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "train_tokens": sum(row["tokens"] for row in train.values()),
        "valid_tokens": sum(row["tokens"] for row in valid.values()),
        "sources": train,
        "valid_sources": valid,
        "seed": seed,
        "fim_rate": fim_rate,
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def read_meta(folder: str | Path) -> dict[str, Any]:
    """meta.json of a folder of packed tokens, its files checked for presence and size."""
    path = Path(folder) / "meta.json"
    if not os.path.lexists(path):
        raise SoliError(f"{folder} holds no packed tokens (no meta.json): run `soli data build` first")
    meta = read_object(path)
    try:
        for name, kind in META_FIELDS.items():
            if name in meta:
                meta[name] = convert(name, meta[name], kind)
            elif name in REQUIRED_META:
                raise SoliError(f"it has no {name}")
        for name in ("sources", "valid_sources"):
            for source, row in meta.get(name, {}).items():
                if missing := {"tokens", "documents"} - row.keys():
                    raise SoliError(f"{name}.{source} has no {min(missing)}")
    except SoliError as error:
        raise SoliError(f"{path} is damaged ({error}): run `soli data build` again") from None
    width = stored_dtype(meta).itemsize
    expected_tokens = {"train.bin": meta["train_tokens"], "valid.bin": meta["valid_tokens"]}
    for name, tokens in expected_tokens.items():
        file = path.with_name(name)
        size = file.stat().st_size if file.is_file() else 0
        if size != tokens * width or size < 1:
            state = "is missing or empty" if size < 1 else f"holds {size // width:,} tokens, not {tokens:,}"
            raise SoliError(f"{file} {state}: run `soli data build` again")
    return meta


def stored_dtype(meta: dict[str, Any]) -> np.dtype:
    """The integers of train.bin and valid.bin, as meta.json names them."""
    known: dict[str, np.dtype] = {"uint16": DTYPE, "uint32": DTYPE_32}
    return known[meta["dtype"]]


def map_tokens(file: Path, dtype: np.dtype) -> np.memmap:
    """The tokens of a file, mapped from disk and read-only."""
    name_files_that_shrink()
    return np.memmap(file, dtype=dtype, mode="r")


def inspect_folder(folder: Path, samples: int, seed: int) -> dict[str, Any]:
    """meta.json with `characters_per_token`, `document_tokens` (median, 90 %, longest) and decoded `samples`."""
    meta = read_meta(folder)
    if "sources" not in meta:
        raise SoliError(f"{Path(folder) / 'meta.json'} has no sources: run `soli data build` again")
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size != meta.get("vocab_size"):
        raise SoliError(f"{folder} mixes two builds: tokenizer and meta.json differ in vocab_size; build it again")
    tokens = map_tokens(folder / "train.bin", stored_dtype(meta))
    starts = np.flatnonzero(tokens[:_SCANNED_TOKENS] == tokenizer.bos_id)
    count = min(samples, len(starts))
    sampled = sorted(np.random.default_rng(seed).choice(len(starts), size=count, replace=False).tolist())
    ends = np.append(starts[1:], len(tokens))
    return {
        **meta,
        "characters_per_token": _characters_per_token(folder, tokenizer),
        "document_tokens": _lengths(np.diff(starts)),
        "samples": [
            {"at": int(starts[i]), "text": document_text(tokens[starts[i] : ends[i]], tokenizer)} for i in sampled
        ],
    }


def document_text(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """One document as text: the special tokens between its segments by name, bos and eos omitted."""
    names = {tokenizer.token_id(token): token for token in SEGMENT_TOKENS if tokenizer.has_token(token)}
    parts: list[str] = []
    segment: list[int] = []
    for index in map(int, ids):
        if index in names:
            parts += [tokenizer.decode(segment), names[index]]
            segment = []
        else:
            segment.append(index)
    return "".join([*parts, tokenizer.decode(segment)])


def _characters_per_token(folder: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """By language, on the held-out pairs, from which the vocabulary was not learnt."""
    file = folder / "heldout.tsv"
    pairs = list(islice(read_tsv(file, 3), _MEASURED_PAIRS)) if file.is_file() else []
    by_language = {}
    for language, column in (("zh", 1), ("en", 2)):
        texts = [pair[column] for pair in pairs]
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        if tokens:
            by_language[language] = sum(map(len, texts)) / tokens
    return by_language


def _lengths(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    middle, high = np.quantile(lengths, [0.5, 0.9])
    return {"median": int(middle), "90 %": int(high), "longest": int(lengths.max())}
