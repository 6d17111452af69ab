"""What a folder of packed tokens holds: tokens by source, characters per token, document lengths, samples."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from soli.data.packing import read_meta, stored_dtype
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.recipes.nano_corpus.corpus import read_lines

_FRAME = ("<|en|>", "<|zh|>", "<|text|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_MEASURED_PAIRS = 2000
_LONGEST_SCAN = 50_000_000


def inspect_folder(folder: Path, samples: int, seed: int) -> dict[str, Any]:
    """meta.json with `characters_per_token`, `document_tokens` (median, 90 %, longest) and decoded `samples`."""
    meta = read_meta(folder)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise SoliError(f"{folder} mixes two builds: tokenizer and meta.json differ in vocab_size; build it again")
    tokens = np.memmap(folder / "train.bin", dtype=stored_dtype(meta), mode="r")
    starts = np.flatnonzero(tokens[:_LONGEST_SCAN] == tokenizer.bos_id)
    chosen = sorted(
        np.random.default_rng(seed).choice(len(starts), size=min(samples, len(starts)), replace=False).tolist()
    )
    ends = np.append(starts[1:], len(tokens))
    return {
        **meta,
        "characters_per_token": _characters_per_token(folder, tokenizer),
        "document_tokens": _lengths(np.diff(starts)),
        "samples": [{"at": int(starts[i]), "text": framed(tokens[starts[i] : ends[i]], tokenizer)} for i in chosen],
    }


def framed(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """One document as text, with the tokens that part its segments written out and bos and eos left off."""
    marks = {tokenizer.token_id(token): token for token in _FRAME if tokenizer.has_token(token)}
    pieces: list[str] = []
    plain: list[int] = []
    for index in (*(int(i) for i in ids), -1):
        if index in marks or index == -1:
            pieces.append(tokenizer.decode(plain))
            pieces.append(marks.get(index, ""))
            plain = []
        else:
            plain.append(index)
    return "".join(pieces)


def _characters_per_token(folder: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Measured on the held-out pairs, which the vocabulary was not learnt from."""
    pairs = (
        list(islice(read_lines(folder / "heldout.tsv", 3), _MEASURED_PAIRS))
        if (folder / "heldout.tsv").is_file()
        else []
    )
    measured = {}
    for language, column in (("zh", 1), ("en", 2)):
        texts = [pair[column] for pair in pairs]
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        if tokens:
            measured[language] = sum(map(len, texts)) / tokens
    return measured


def _lengths(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    middle, high = np.quantile(lengths, [0.5, 0.9])
    return {"median": int(middle), "90 %": int(high), "longest": int(lengths.max())}
