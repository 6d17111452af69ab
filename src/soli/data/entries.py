"""What a reader of input files yields: the text of a usable line, or why a line is bad."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from soli.errors import SoliError

BLANK = "blank line"  # counted and reported as any bad line is, but tolerated however many there are

EXCERPT_CHARACTERS = 200  # of a bad line, for the report


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
