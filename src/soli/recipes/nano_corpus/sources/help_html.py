"""LibreOffice's help: the same HTML files in English and Chinese, aligned by the identifier of each paragraph.

Paragraphs that a translator left in English are in the Chinese files too; they are dropped because they have no
Chinese characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from soli.data.text import count_han
from soli.recipes.nano_corpus.cleaning import Simplifier, align, is_prose, tidy
from soli.recipes.nano_corpus.fetch import read_members
from soli.recipes.nano_corpus.sources.row import SourceRow

_PARAGRAPH = re.compile(r'<(p|h[1-6])[^>]*\bid="((?:par|hd)_[^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_SHORTEST_EN, _SHORTEST_ZH = 100, 32


def paragraphs(page: bytes) -> dict[str, str]:
    """Text by paragraph identifier; the first of a repeated identifier counts."""
    texts: dict[str, str] = {}
    for _, identifier, inner in _PARAGRAPH.findall(page.decode("utf-8", errors="replace")):
        texts.setdefault(identifier, tidy(_TAG.sub("", inner)))
    return texts


def _pages(archive: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(path below the language's folder, paragraphs) of each help page."""
    for name, content in read_members(archive, "*/libreoffice/help/*/text/*.html"):
        yield name.partition("/text/")[2], paragraphs(content)


def read_pairs(archives: list[Path]) -> Iterator[SourceRow]:
    """Sentence pairs from an English and a Chinese package."""
    english = dict(_pages(archives[0]))
    for name, page in _pages(archives[1]):
        originals = english.get(name, {})
        for identifier, chinese in page.items():
            original = originals.get(identifier, "")
            if original and original != chinese:
                yield from (SourceRow(zh, en) for zh, en in align(chinese, original))


def read_pairs_taiwan(archives: list[Path]) -> Iterator[SourceRow]:
    """The same for Taiwan's translation, converted to the mainland's words and characters."""
    simplify = Simplifier("tw2sp")
    for zh, en, tag in read_pairs(archives):
        yield SourceRow(simplify(zh), en, tag)


def read_english(archives: list[Path]) -> Iterator[SourceRow]:
    """Whole English paragraphs, the longer ones."""
    for _, page in _pages(archives[0]):
        yield from (SourceRow("", text) for text in page.values() if is_prose(text, _SHORTEST_EN))


def read_chinese(archives: list[Path]) -> Iterator[SourceRow]:
    """Whole Chinese paragraphs, the longer ones; those left in English are not Chinese text."""
    for _, page in _pages(archives[0]):
        for text in page.values():
            if is_prose(text, _SHORTEST_ZH) and 2 * count_han(text) >= len(text):
                yield SourceRow(text, "")
