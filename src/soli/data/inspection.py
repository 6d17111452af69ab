"""What a folder of packed tokens holds: tokens by source, characters per token, document lengths, samples."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from soli.data.token_files import read_meta, stored_dtype
from soli.data.tokenizer import Tokenizer
from soli.data.tsv import read_tsv
from soli.errors import SoliError

SEGMENT_TOKENS = ("<|en|>", "<|zh|>", "<|text|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_MEASURED_PAIRS = 2000
_SCANNED_TOKENS = 50_000_000


def inspect_folder(folder: Path, samples: int, seed: int) -> dict[str, Any]:
    """meta.json with `characters_per_token`, `document_tokens` (median, 90 %, longest) and decoded `samples`."""
    meta = read_meta(folder)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise SoliError(f"{folder} mixes two builds: tokenizer and meta.json differ in vocab_size; build it again")
    tokens = np.memmap(folder / "train.bin", dtype=stored_dtype(meta), mode="r")
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
