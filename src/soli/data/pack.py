"""Input files of a user into packed tokens: the folder that `soli data build` writes, from files instead of packages.

Two passes. The first reads every input once: what a hash of its text holds out goes to valid.bin, everything else,
encoded, to a temporary file. The second draws the mixture (weights as copies) and writes train.bin in one shuffled
order. Memory holds a batch of documents and some 30 bytes for each document, never a corpus.
"""

import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from soli.atomic_file import write_errors
from soli.data.documents import Document, Pair, ReportStep, draw_copies, encode_documents, pair_documents, text_document
from soli.data.entries import BadLineLog
from soli.data.readers import InputLayout, usable_entries
from soli.data.text import is_held_out
from soli.data.token_files import TokenWriter, Totals, dtype_for, map_tokens, read_meta, write_meta, write_tokens
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.links import matching_files
from soli.sections import Bounds, NonNegativeInt, Section, Share, convert

_REPORT_EVERY = 2000  # documents
_BREAKS = ("\n\n", "\n", "。", ". ", " ")


@dataclass(frozen=True)
class Input:
    """A file or folder and its weight: mean copies of each document in an epoch."""

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        convert(f"the weight of {self.path}", self.weight, Annotated[float, Bounds(at_least=0, at_most=100)])

    @property
    def source(self) -> str:
        """Its name in tables and meta.json."""
        return " ".join(str(self.path).split())


@dataclass(frozen=True)
class PackConfig(Section, section=""):
    """What to pack and how. Checked at construction."""

    inputs: tuple[Input, ...]
    layout: InputLayout = field(default_factory=InputLayout)
    heldout_every: Annotated[int, Bounds(at_least=2)] = 200  # one document in so many is held out, by a hash of it
    fim_rate: Share = 0.0  # share of plain training documents rearranged as prefix, suffix, middle
    longest_document: Annotated[int, Bounds(at_least=50)] | None = None  # characters; a longer text is cut
    seed: NonNegativeInt = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        repeated = [name for name, count in Counter(item.source for item in self.inputs).items() if count > 1]
        if repeated:
            raise SoliError(f"{repeated[0]} is given twice: give it once, with a weight, as in {repeated[0]}=2")
        if self.is_pairs and (self.fim_rate or self.longest_document):
            raise SoliError("pairs are neither cut nor rearranged: omit --fim-rate and --longest")

    @property
    def is_pairs(self) -> bool:
        """Two fields are English and Chinese of one pair."""
        return len(self.layout.fields) == 2


@dataclass
class FirstPass:
    """Training documents, encoded end to end in `file`: the end of each, and the index of its input."""

    file: Path
    ends: array = field(default_factory=lambda: array("Q"))
    inputs: array = field(default_factory=lambda: array("I"))
    valid: Totals = field(default_factory=dict)
    bad_lines: dict[str, int] = field(default_factory=dict)


def pack_inputs(
    config: PackConfig, tokenizer_folder: Path, out: Path, report: ReportStep, print_line: Callable[[str], None]
) -> dict[str, Any]:
    """Write `out` (train.bin, valid.bin, meta.json, tokenizer.json, bad_lines.jsonl; of pairs also heldout.tsv).

    Returns meta.json's content with `bad_lines` by file. `print_line` prints the bad lines to show. The folder is
    written beside `out` and renamed when complete; an `out` that is not empty is an error.
    """
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    _check_tokens(config, tokenizer)
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SoliError(f"{out} exists already: choose another --out, or remove it first")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with write_errors(out):
            partial.mkdir(parents=True)
            bad_lines = _pack_into(partial, config, tokenizer, tokenizer_folder, report, print_line)
            partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**read_meta(out), "bad_lines": bad_lines}


def _check_tokens(config: PackConfig, tokenizer: Tokenizer) -> None:
    """SoliError, before anything is read, when the vocabulary lacks a special token that documents need."""
    needed = ["<|en|>", "<|zh|>"] if config.is_pairs else []
    needed += ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"] if config.fim_rate else []
    for token in needed:
        tokenizer.token_id(token)


def _pack_into(
    folder: Path,
    config: PackConfig,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    report: ReportStep,
    print_line: Callable[[str], None],
) -> dict[str, int]:
    rng = np.random.default_rng(config.seed)
    first = _first_pass(folder, config, tokenizer, rng, report, print_line)
    if not first.valid:
        raise SoliError(
            f"no document is held out: of {len(first.ends):,}, one in {config.heldout_every} should be: lower "
            "--heldout-every, give more documents, or make each line one with --lines"
        )
    report("train.bin", "packing")
    train = _second_pass(first, config, tokenizer, rng)
    report("train.bin", f"{sum(row['tokens'] for row in train.values()):,} tokens")
    for name, file in matching_files(tokenizer_folder, ("tokenizer.json", "tokenizer_config.json")).items():
        shutil.copyfile(file, folder / name)
    if not (folder / "tokenizer.json").exists():  # the tokenizer is a tiktoken.model
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    vocab_size = tokenizer.vocab_size
    write_meta(folder, vocab_size, config.seed, train, first.valid, config.fim_rate, dtype_for(vocab_size))
    return first.bad_lines


def _first_pass(
    folder: Path,
    config: PackConfig,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    report: ReportStep,
    print_line: Callable[[str], None],
) -> FirstPass:
    """Read and encode everything: held-out documents into valid.bin, the others into the first pass's file."""
    first = FirstPass(folder / "encoded.bin")
    input_index = {item.source: n for n, item in enumerate(config.inputs)}
    dtype = dtype_for(tokenizer.vocab_size)
    pairs_file = (folder / "heldout.tsv").open("w", encoding="utf-8") if config.is_pairs else nullcontext()
    with (
        BadLineLog(folder / "bad_lines.jsonl", print_line) as bad_lines,
        TokenWriter(first.file, dtype) as train,
        TokenWriter(folder / "valid.bin", dtype) as valid,
        pairs_file as pairs,
    ):
        text_token = "<|text|>" if tokenizer.has_token("<|text|>") else ""
        for document, ids in encode_documents(_documents(config, text_token, rng, bad_lines, report), tokenizer):
            if not document.heldout:
                train.write(document.source, ids)
                first.ends.append(train.tokens)
                first.inputs.append(input_index[document.source])
                continue
            valid.write(document.source, ids)
            if pairs and document.segments[0][0] == "<|en|>":
                cells = (document.source, document.segments[1][1], document.segments[0][1])
                pairs.write("\t".join(" ".join(cell.split()) for cell in cells) + "\n")
    first.valid = valid.totals
    first.bad_lines = dict(bad_lines.counts)
    return first


def _documents(
    config: PackConfig, text_token: str, rng: np.random.Generator, bad_lines: BadLineLog, report: ReportStep
) -> Iterator[Document]:
    """Documents of every input in order; a plain text starts with `text_token`, unless that is empty."""
    for item in config.inputs:
        count = 0
        for entry in usable_entries(item.path, config.layout, bad_lines):
            yield from _documents_of(item.source, entry.texts, config, text_token, rng)
            count += 1
            if count % _REPORT_EVERY == 0:
                report(item.source, f"{count:,} texts, reading")
        report(item.source, f"{count:,} texts")


def _documents_of(
    source: str, texts: Sequence[str], config: PackConfig, text_token: str, rng: np.random.Generator
) -> Iterator[Document]:
    """A pair in both directions, or a text cut to length; all on one side of the split."""
    heldout = is_held_out(texts[0], config.heldout_every)
    if config.is_pairs:
        english, chinese = texts
        for document in pair_documents(Pair(source, chinese, english)):
            yield document._replace(heldout=heldout)
        return
    for part in cut(texts[0], config.longest_document):
        rate = 0.0 if heldout else config.fim_rate
        yield text_document(source, part, rate, rng, text_token)._replace(heldout=heldout)


def cut(text: str, longest: int | None) -> Iterator[str]:
    """Parts of at most `longest` characters that join to the text.

    Each ends after the last paragraph break in its second half, else after the last line, sentence or space there,
    else at full length.
    """
    start = 0
    while longest is not None and len(text) - start > longest:
        full = start + longest
        breaks = ((text.rfind(mark, start + longest // 2, full), len(mark)) for mark in _BREAKS)
        end = next((position + length for position, length in breaks if position >= 0), full)
        yield text[start:end]
        start = end
    yield text[start:]


def _second_pass(first: FirstPass, config: PackConfig, tokenizer: Tokenizer, rng: np.random.Generator) -> Totals:
    """train.bin: copies of each document by its input's weight, all in one shuffled order."""
    copies = np.fromiter((draw_copies(config.inputs[n].weight, rng) for n in first.inputs), np.int64, len(first.inputs))
    order = rng.permutation(np.repeat(np.arange(len(copies)), copies))
    if not len(order):
        raise SoliError("no document remains to train on: give more documents, or weights above 0")
    dtype = dtype_for(tokenizer.vocab_size)
    tokens = map_tokens(first.file, dtype)
    ends = np.frombuffer(first.ends, dtype=np.uint64)
    starts = np.concatenate([[np.uint64(0)], ends[:-1]])
    documents = ((config.inputs[first.inputs[n]].source, tokens[starts[n] : ends[n]]) for n in order)
    totals = write_tokens(first.file.with_name("train.bin"), documents, dtype)
    first.file.unlink()
    return {item.source: totals[item.source] for item in config.inputs if item.source in totals}
