"""Pairs from files with a structure of their own: GNOME's Mallard pages, CC-CEDICT's entries."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from soli.data.text import count_han
from soli.recipes.nano_corpus.cleaning import align
from soli.recipes.nano_corpus.fetch import gunzip, read_members
from soli.recipes.nano_corpus.sources.row import SourceRow

_MALLARD = "{http://projectmallard.org/1.0/}"
_ENTRY = re.compile(r"^\S+ (\S+) \[[^\]]*\] /(.+)/$")
_SENSES = 3
_CROSS_REFERENCE = re.compile(r"\[|\||^CL:|^(?:see|see also|also written|also pr\.|Taiwan pr\.|pr\.) |variant of")
_LABEL = re.compile(r"^\((?:Tw|coll\.|lit\.|fig\.)\) ")


def _blocks(page: bytes) -> list[tuple[str, str]]:
    """(tag, text) of each title and paragraph of a Mallard page, without the credits."""
    root = ElementTree.fromstring(page)
    for info in root.iter(f"{_MALLARD}info"):
        for child in [child for child in info if child.tag != f"{_MALLARD}desc"]:
            info.remove(child)
    block_tags = {f"{_MALLARD}{tag}" for tag in ("title", "p", "desc")}
    return [(e.tag, " ".join("".join(e.itertext()).split())) for e in root.iter() if e.tag in block_tags]


def read_gnome(archives: list[Path]) -> Iterator[SourceRow]:
    """Paragraphs in the same order of pages that have the same sequence of tags in both languages."""
    pages: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, content in read_members(archives[0], "usr/share/help/*/*.page"):
        language, _, rest = name.removeprefix("usr/share/help/").partition("/")
        if language in ("C", "zh_CN"):
            pages[rest, language] = _blocks(content)
    for (rest, language), chinese in pages.items():
        english = pages.get((rest, "C"), [])
        if language == "zh_CN" and [tag for tag, _ in chinese] == [tag for tag, _ in english]:
            for (_, zh), (_, en) in zip(chinese, english, strict=True):
                yield from (SourceRow(*pair) for pair in align(zh, en) if zh != en)


def read_cedict(archives: list[Path]) -> Iterator[SourceRow]:
    """Simplified headword and its first senses, without cross references, classifiers and labels of usage."""
    for name, content in read_members(archives[0], "*/cedict*.txt.gz"):
        for line in gunzip(content, name).decode("utf-8").splitlines():
            entry = _ENTRY.match(line)
            if entry is None:
                continue
            senses = [_LABEL.sub("", sense) for sense in entry[2].split("/")]
            senses = [sense for sense in senses if not _CROSS_REFERENCE.search(sense) and not count_han(sense)]
            if senses:
                yield SourceRow(entry[1], "; ".join(senses[:_SENSES]))
