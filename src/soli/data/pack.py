"""A person's own texts into packed tokens: the folder that `soli data build` leaves, from files instead of packages.

Two passes. The first reads every input once: what a hash of its text holds out goes to valid.bin, the rest, encoded, to
a file of its own. The second draws the mixture (weights as copies, as in mixture.py) and writes train.bin in one
shuffled order. Memory holds a batch of documents and some 30 bytes for each document, never a corpus.
"""

from __future__ import annotations

import math
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from soli.data.bad_lines import BadLines, good_entries
from soli.data.mixture import Document, copies, encoded, pair_documents, text_document
from soli.data.packing import TokenWriter, Totals, dtype_for, read_meta, write_meta, write_tokens
from soli.data.readers import Layout
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.recipes.nano_corpus.corpus import Pair, Report, held_out_by_hash

_REPORT_EVERY = 2000  # documents
_BREAKS = ("\n\n", "\n", "。", ". ", " ")


@dataclass(frozen=True)
class Input:
    """A file or folder and its weight: mean copies of each document in an epoch."""

    path: Path
    weight: float = 1.0

    @property
    def source(self) -> str:
        """Its name in tables and meta.json."""
        return " ".join(str(self.path).split())


@dataclass(frozen=True)
class PackConfig:
    """What to pack and how. Checked at construction."""

    inputs: tuple[Input, ...]
    layout: Layout = field(default_factory=Layout)
    heldout_every: int = 200  # one document in so many is held out, by a hash of its text
    fim_rate: float = 0.0  # share of plain training documents rearranged as prefix, suffix, middle
    longest_document: int | None = None  # characters; a longer text becomes several documents
    seed: int = 1

    def __post_init__(self) -> None:
        for given in self.inputs:
            if not (math.isfinite(given.weight) and 0 <= given.weight <= 100):
                raise SoliError(f"the weight of {given.path} is {given.weight:g}: write a number from 0 to 100")
        repeated = [name for name, times in Counter(given.source for given in self.inputs).items() if times > 1]
        if repeated:
            raise SoliError(f"{repeated[0]} is given twice: give it once, with a weight, as in {repeated[0]}=2")
        for name, lowest in (("heldout_every", 2), ("longest_document", 50), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise SoliError(f"{name} is {value}: write a whole number of at least {lowest}")
        if not 0 <= self.fim_rate <= 1:
            raise SoliError(f"fim_rate is {self.fim_rate:g}: write a share from 0 to 1")
        if self.is_pairs and (self.fim_rate or self.longest_document):
            raise SoliError("pairs are neither cut nor rearranged: leave out --fim-rate and --longest")

    @property
    def is_pairs(self) -> bool:
        """Two fields are English and Chinese of one pair."""
        return len(self.layout.fields) == 2


@dataclass
class FirstPass:
    """Training documents, encoded end to end in `file`: where each ends, and which input it came from."""

    file: Path
    ends: array = field(default_factory=lambda: array("Q"))
    inputs: array = field(default_factory=lambda: array("I"))
    valid: Totals = field(default_factory=dict)
    bad_lines: dict[str, int] = field(default_factory=dict)


def pack_inputs(
    config: PackConfig, tokenizer_folder: Path, out: Path, report: Report, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Write `out` (train.bin, valid.bin, meta.json, tokenizer.json, bad_lines.jsonl; of pairs also heldout.tsv).

    Returns meta.json's content with `bad_lines` by file. `tell` takes a line of text for each bad line to show. The
    folder is written beside its place and renamed when whole; an `out` with something in it is refused.
    """
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    _check_tokens(config, tokenizer)
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SoliError(f"{out} is there already: choose another --out, or remove it first")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        bad_lines = _pack_into(partial, config, tokenizer, tokenizer_folder, report, tell)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**read_meta(out), "bad_lines": bad_lines}


def _check_tokens(config: PackConfig, tokenizer: Tokenizer) -> None:
    """SoliError, before anything is read, when the vocabulary lacks a token that documents will need."""
    needed = ["<|en|>", "<|zh|>"] if config.is_pairs else []
    needed += ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"] if config.fim_rate else []
    for token in needed:
        tokenizer.token_id(token)


def _pack_into(
    folder: Path,
    config: PackConfig,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    report: Report,
    tell: Callable[[str], None],
) -> dict[str, int]:
    rng = np.random.default_rng(config.seed)
    first = _first_pass(folder, config, tokenizer, rng, report, tell)
    if not first.valid:
        raise SoliError(
            f"no document is held out: of {len(first.ends):,}, one in {config.heldout_every} should be; lower "
            "--heldout-every, give more documents, or make each line one with --lines"
        )
    report("train.bin", "packing")
    train = _second_pass(first, config, tokenizer, rng)
    report("train.bin", f"{sum(row['tokens'] for row in train.values()):,} tokens")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    dtype = dtype_for(tokenizer.vocab_size)
    write_meta(folder, tokenizer.vocab_size, config.seed, train, first.valid, config.fim_rate, dtype)
    return first.bad_lines


def _first_pass(
    folder: Path,
    config: PackConfig,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    report: Report,
    tell: Callable[[str], None],
) -> FirstPass:
    """Read and encode everything: held-out documents into valid.bin, the others into the first pass's file."""
    first = FirstPass(folder / "encoded.bin")
    number = {given.source: n for n, given in enumerate(config.inputs)}
    dtype = dtype_for(tokenizer.vocab_size)
    pairs_file = (folder / "heldout.tsv").open("w", encoding="utf-8") if config.is_pairs else nullcontext()
    with (
        BadLines(folder / "bad_lines.jsonl", tell) as bad,
        TokenWriter(first.file, dtype) as train,
        TokenWriter(folder / "valid.bin", dtype) as valid,
        pairs_file as pairs,
    ):
        plain = "<|text|>" if tokenizer.has_token("<|text|>") else ""
        for document, ids in encoded(_documents(config, plain, rng, bad, report), tokenizer):
            if not document.heldout:
                train.write(document.source, ids)
                first.ends.append(train.tokens)
                first.inputs.append(number[document.source])
                continue
            valid.write(document.source, ids)
            if pairs and document.segments[0][0] == "<|en|>":
                cells = (document.source, document.segments[1][1], document.segments[0][1])
                pairs.write("\t".join(" ".join(cell.split()) for cell in cells) + "\n")
    first.valid, first.bad_lines = valid.totals, dict(bad.counts)
    return first


def _documents(
    config: PackConfig, plain: str, rng: np.random.Generator, bad: BadLines, report: Report
) -> Iterator[Document]:
    """Documents of every input in order; `plain` is the token that begins a plain text, if there is one."""
    for given in config.inputs:
        count = 0
        for entry in good_entries(given.path, config.layout, bad):
            yield from _of_entry(given.source, entry.texts, config, plain, rng)
            count += 1
            if count % _REPORT_EVERY == 0:
                report(given.source, f"{count:,} texts, reading")
        report(given.source, f"{count:,} texts")


def _of_entry(
    source: str, texts: Sequence[str], config: PackConfig, plain: str, rng: np.random.Generator
) -> Iterator[Document]:
    """A pair in both directions, or a text in pieces; all on one side of the split."""
    heldout = held_out_by_hash(texts[0], config.heldout_every)
    if config.is_pairs:
        english, chinese = texts
        for document in pair_documents(Pair(source, chinese, english)):
            yield document._replace(heldout=heldout)
        return
    for piece in pieces(texts[0], config.longest_document):
        rate = 0.0 if heldout else config.fim_rate
        yield text_document(source, piece, rate, rng, plain)._replace(heldout=heldout)


def pieces(text: str, longest: int | None) -> Iterator[str]:
    """Parts of at most `longest` characters that join to the text.

    Each ends behind the last paragraph in its second half, else behind the last line, sentence or space there, else
    where it is full.
    """
    start = 0
    while longest is not None and len(text) - start > longest:
        full = start + longest
        found = ((text.rfind(mark, start + longest // 2, full), len(mark)) for mark in _BREAKS)
        end = next((at + length for at, length in found if at >= 0), full)
        yield text[start:end]
        start = end
    yield text[start:]


def _second_pass(first: FirstPass, config: PackConfig, tokenizer: Tokenizer, rng: np.random.Generator) -> Totals:
    """train.bin: each document as often as its input's weight says, all in one shuffled order."""
    weights = [given.weight for given in config.inputs]
    times = np.fromiter((copies(weights[n], rng) for n in first.inputs), np.int64, len(first.inputs))
    order = rng.permutation(np.repeat(np.arange(len(times)), times))
    if not len(order):
        raise SoliError("no document is left to train on: give more documents, or weights above 0")
    dtype = dtype_for(tokenizer.vocab_size)
    tokens = np.memmap(first.file, dtype=dtype, mode="r")
    ends = np.frombuffer(first.ends, dtype=np.uint64)
    starts = np.concatenate([[np.uint64(0)], ends[:-1]])
    drawn = ((config.inputs[first.inputs[n]].source, tokens[starts[n] : ends[n]]) for n in order)
    totals = write_tokens(first.file.with_name("train.bin"), drawn, dtype)
    first.file.unlink()
    return {given.source: totals[given.source] for given in config.inputs if given.source in totals}
