"""Packed tokens on disk: documents end to end in flat files of 16-bit little-endian integers, with a meta.json beside.

What training reads from them, and in which order, is in soli/train/batches.py. Refuses files unlike their meta.json.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from soli.errors import SoliError

DTYPE = np.dtype("<u2")

Totals = dict[str, dict[str, int]]
"""`tokens` and `documents` by source."""


def write_tokens(path: Path, documents: Iterable[tuple[str, list[int]]]) -> Totals:
    """Write (source, ids) documents end to end; tokens and documents by source. Renamed into place when whole."""
    totals: Totals = defaultdict(lambda: {"tokens": 0, "documents": 0})
    partial = path.with_suffix(".partial")
    with partial.open("wb") as out:
        for source, ids in documents:
            out.write(np.asarray(ids, dtype=DTYPE).tobytes())
            totals[source]["tokens"] += len(ids)
            totals[source]["documents"] += 1
    partial.replace(path)
    return dict(totals)


def write_meta(folder: Path, vocab_size: int, seed: int, train: Totals, valid: Totals) -> None:
    """meta.json of a folder whose train.bin, valid.bin and tokenizer.json are in place."""
    meta = {
        "dtype": "uint16",
        "vocab_size": vocab_size,
        "train_tokens": sum(row["tokens"] for row in train.values()),
        "valid_tokens": sum(row["tokens"] for row in valid.values()),
        "sources": train,
        "valid_sources": valid,
        "seed": seed,
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def read_meta(folder: str | Path) -> dict[str, Any]:
    """meta.json of a folder of packed tokens, its files checked for presence and size."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise SoliError(f"{folder} holds no packed tokens (no meta.json): run `soli data build` first")
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"train.bin": int(meta["train_tokens"]), "valid.bin": int(meta["valid_tokens"])}
    except (ValueError, KeyError, TypeError) as error:
        raise SoliError(f"{path} is damaged ({error}): run `soli data build` again") from error
    for name, tokens in wanted.items():
        file = path.with_name(name)
        size = file.stat().st_size if file.is_file() else -1
        if size != tokens * DTYPE.itemsize:
            state = "is missing" if size < 0 else f"holds {size // DTYPE.itemsize:,} tokens, not {tokens:,}"
            raise SoliError(f"{file} {state}: run `soli data build` again")
    return meta
