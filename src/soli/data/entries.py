"""What a reader of input files yields: the text of a usable line, or why a line is bad; and the log of bad lines."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from soli.errors import SoliError

BLANK = "blank line"  # counted and reported as any bad line is, but tolerated however many there are

EXCERPT_CHARACTERS = 200  # of a bad line, for the report
PRINTED_PER_FILE = 5  # bad lines of a file that are printed as they are met


class TextEntry(NamedTuple):
    """The text of the requested fields, and their line (from 1; row, in binary formats)."""

    line: int
    texts: tuple[str, ...]


class BadLine(NamedTuple):
    """A line that cannot be used, the reason, and its beginning."""

    line: int
    reason: str
    excerpt: str = ""


def text_entry(line: int, fields: Sequence[str], values: Sequence[object], raw: object) -> TextEntry | BadLine:
    """A TextEntry if every field is text that is not empty; bytes stand for text that is not UTF-8, None for none."""
    for name, value in zip(fields, values, strict=True):
        fault = _fault(name, value)
        if fault:
            return BadLine(line, fault, str(raw)[:EXCERPT_CHARACTERS])
    return TextEntry(line, tuple(str(value) for value in values))


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


def missing_column(path: Path, field: str, columns: Sequence[str]) -> SoliError:
    """The error for a column that a table lacks, with those that it has."""
    names = ", ".join(column[:40] for column in columns[:20])
    return SoliError(f"{path} has no column {field}; it has {names}: choose with --field, or --pair ENGLISH,CHINESE")


class BadLineLog:
    """Every bad line as a row of a JSONL file, counted by file; `print_line` prints the ones to show."""

    def __init__(self, path: Path, print_line: Callable[[str], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._path, self._print_line = path, print_line

    def __enter__(self) -> Self:
        self._out = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        for name, count in self.counts.items():
            if count > PRINTED_PER_FILE:
                self._print_line(f"{name}: {count - PRINTED_PER_FILE:,} more bad lines")

    def add(self, file: Path, bad: BadLine) -> None:
        name = str(file)
        self.counts[name] += 1
        row = {"file": name, "line": bad.line, "why": bad.reason, "excerpt": bad.excerpt}
        self._out.write(json.dumps(row) + "\n")  # ASCII: an excerpt may hold what is not Unicode
        if self.counts[name] <= PRINTED_PER_FILE:
            self._print_line(f"{name}:{bad.line}: {bad.reason}")
