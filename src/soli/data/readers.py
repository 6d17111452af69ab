"""A person's own files, read line by line: JSON lines, tab-separated columns, plain text, parquet, `datasets` folders.

A reader yields an Entry for each good line and a BadLine for each other: broken JSON, a missing field, invalid UTF-8,
nothing in it, too few columns. It holds one line (or one batch of a parquet file) at a time. Refuses, in a sentence
that names the file, what it cannot read at all: an unknown format, a column that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from soli.errors import SoliError

SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"),
    "text": (".txt", ".md"),
    "tsv": (".tsv", ".tab"),
    "parquet": (".parquet",),
}
FORMATS = (*SUFFIXES, "datasets")

BLANK = "blank line"
"""Counted and reported as any bad line is, but harmless however many there are."""

_EXCERPT = 200  # characters of a bad line that are kept


class Entry(NamedTuple):
    """The text of the fields asked for, and the line (from 1; row, in binary formats) that they stand in."""

    line: int
    texts: tuple[str, ...]


class BadLine(NamedTuple):
    line: int
    why: str
    excerpt: str = ""


@dataclass(frozen=True)
class Layout:
    """How inputs are read. `fields` are names (a dot leads inside), or, in TSV without a header, numbers from 1.

    `lines`: in plain text each line is a document, not each file. `format` overrides what a file's ending says.
    """

    fields: tuple[str, ...] = ("text",)
    lines: bool = False
    format: str | None = None

    def __post_init__(self) -> None:
        if self.format not in (None, *FORMATS):
            raise SoliError(f"format is {self.format!r}: choose one of {', '.join(FORMATS)}")
        if not all(field.strip() for field in self.fields):
            raise SoliError("a field's name is empty: write --field NAME, or --pair ENGLISH,CHINESE")


def files_of(path: Path, layout: Layout) -> tuple[str, list[Path]]:
    """The format of an input and its files in a stable order: itself, or what a folder holds."""
    if not path.exists():
        raise SoliError(f"{path} does not exist: give files or folders of text")
    if not path.is_dir():
        return layout.format or _format_of(path), [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(found.parent.name for found in path.glob("*/state.json"))
        raise SoliError(f"{path} holds several splits: give one, as in {path / (splits or ['train'])[0]}")
    if (path / "state.json").is_file():
        return "datasets", [path]
    return _folder(path, layout)


def _folder(path: Path, layout: Layout) -> tuple[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            continue  # hidden, or an output that is being written there
        for name, suffixes in SUFFIXES.items():
            if file.suffix.lower() in suffixes and file.is_file() and layout.format in (None, name):
                found.setdefault(name, []).append(file)
    if len(found) != 1:
        what = f"{' and '.join(found)} files: choose with --format" if found else "no file of a known kind"
        raise SoliError(f"{path} holds {what} ({_known_suffixes()})")
    return next(iter(found.items()))


def _format_of(path: Path) -> str:
    for name, suffixes in SUFFIXES.items():
        if path.suffix.lower() in suffixes:
            return name
    raise SoliError(f"{path} is of no known kind ({_known_suffixes()}): say which with --format")


def _known_suffixes() -> str:
    return ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)


def read_file(path: Path, form: str, layout: Layout) -> Iterator[Entry | BadLine]:
    """Entries and bad lines of one file (or `datasets` folder) of a format, in order."""
    if form == "text":
        if len(layout.fields) != 1:
            raise SoliError(f"{path} is plain text, which has no columns for --pair: give JSONL, TSV or parquet")
        return _lines(path) if layout.lines else _document(path)
    if form == "jsonl":
        return _read_jsonl(path, layout.fields)
    if form == "tsv":
        return _read_tsv(path, layout.fields)
    from soli.data.arrow import read_dataset, read_parquet

    return (read_parquet if form == "parquet" else read_dataset)(path, layout.fields)


def entry(line: int, fields: Sequence[str], values: Sequence[object], raw: object) -> Entry | BadLine:
    """An Entry if every field is text with something in it; bytes are text that was not UTF-8, None was not there."""
    for name, value in zip(fields, values, strict=True):
        fault = _fault(name, value)
        if fault:
            return BadLine(line, fault, str(raw)[:_EXCERPT])
    return Entry(line, tuple(str(value) for value in values))


def _fault(name: str, value: object) -> str:
    if value is None:
        return f"no {name}"
    if isinstance(value, bytes):
        return f"{name} is not UTF-8"
    if not isinstance(value, str):
        return f"{name} is not text but {type(value).__name__}"
    if not value.strip():
        return f"{name} is empty"
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        return f"{name} holds half a surrogate pair, which is no character"
    return ""


def _lines(path: Path) -> Iterator[Entry | BadLine]:
    """Each line of a file without its ending; a byte order mark in front is dropped."""
    with path.open("rb") as raw:
        for number, line in enumerate(raw, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                shown = line[:_EXCERPT].decode("utf-8", "backslashreplace")
                yield BadLine(number, f"not UTF-8 at byte {error.start + 1} of the line", shown)
                continue
            yield Entry(number, (text,)) if text.strip() else BadLine(number, BLANK)


def _document(path: Path) -> Iterator[Entry | BadLine]:
    """A whole file as one document, without blank lines around it."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        yield BadLine(data.count(b"\n", 0, error.start) + 1, "not UTF-8")
        return
    yield Entry(1, (text,)) if text.strip() else BadLine(1, "empty file")


def _read_jsonl(path: Path, fields: Sequence[str]) -> Iterator[Entry | BadLine]:
    for row in _lines(path):
        yield row if isinstance(row, BadLine) else _parse(row.line, row.texts[0], fields)


def _parse(line: int, text: str, fields: Sequence[str]) -> Entry | BadLine:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        return BadLine(line, f"not JSON: {error.msg} at character {error.pos + 1}", text[:_EXCERPT])
    except (RecursionError, ValueError) as error:  # nested thousands deep; a number of thousands of digits
        return BadLine(line, f"JSON that cannot be read: {error}", text[:_EXCERPT])
    if not isinstance(found, dict):
        return BadLine(line, f"not a JSON object but {type(found).__name__}", text[:_EXCERPT])
    return entry(line, fields, [_find(found, field) for field in fields], text)


def _find(found: dict[str, object], field: str) -> object:
    """The value of a field; `a.b` is the key `a.b` where there is one, else the key `b` of the object `a`."""
    if field in found:
        return found[field]
    first, dot, rest = field.partition(".")
    inner = found.get(first) if dot else None
    return _find(inner, rest) if isinstance(inner, dict) else None


def _read_tsv(path: Path, fields: Sequence[str]) -> Iterator[Entry | BadLine]:
    """Columns by number (no header line), or by name (the first line holds names). Quotes mean nothing."""
    numbered = all(field.isdecimal() for field in fields)
    places: list[int] | None = None
    width = 0
    for row in _lines(path):
        if isinstance(row, BadLine):
            yield row
            continue
        cells = row.texts[0].split("\t")
        if places is None:
            places, width = _places(path, cells, fields, numbered), len(cells)
            if not numbered:
                continue
        if len(cells) != width:
            yield BadLine(row.line, f"{len(cells)} columns, not {width}", row.texts[0][:_EXCERPT])
        else:
            yield entry(row.line, fields, [cells[place] for place in places], row.texts[0])


def _places(path: Path, cells: Sequence[str], fields: Sequence[str], numbered: bool) -> list[int]:
    for field in fields:
        if numbered and not 1 <= int(field) <= len(cells):
            raise SoliError(f"{path} has {len(cells)} columns, so none is number {field}: count them from 1")
        if not numbered and field not in cells:
            raise missing_column(path, field, cells)
    return [int(field) - 1 if numbered else cells.index(field) for field in fields]


def missing_column(path: Path, field: str, columns: Sequence[str]) -> SoliError:
    """A column that a table lacks, with those that it has."""
    shown = ", ".join(column[:40] for column in columns[:20])
    return SoliError(f"{path} has no column {field}; it has {shown}: choose with --field, or --pair ENGLISH,CHINESE")
