"""Pairs that no package index has and that travel with the recipe: `pairs/LICENCES.md` says where each came from."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from soli.data.documents import Pair
from soli.recipes.nano_corpus.sources.extra import read_extra
from soli.recipes.nano_corpus.sources.row import SourceRow

FOLDER: Final = Path(__file__).parents[1] / "pairs"


def read_distilled(archives: list[Path]) -> Iterator[SourceRow]:
    """Everyday English sentences with a teacher model's Chinese; needs no archive."""
    with lzma.open(FOLDER / "distilled.tsv.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            zh, en, _ = line.rstrip("\n").split("\t")
            yield SourceRow(zh, en)


def read_public(name: str, archives: list[Path]) -> Iterator[SourceRow]:
    """Pairs of one source of public repositories; needs no archive."""
    return (row for source, row in read_extra([FOLDER / "public.tsv.xz"]) if source == name)


def read_back_translated(archives: list[Path]) -> Iterator[SourceRow]:
    """Everyday Chinese sentences with the bundled model's English, for English to Chinese; needs no archive."""
    return (row for _, row in read_extra([FOLDER / "back_translated.tsv.xz"]))


def everyday_pairs() -> list[Pair]:
    """The held-out everyday sentences, source `everyday`."""
    lines = (FOLDER / "everyday.tsv").read_text(encoding="utf-8").splitlines()
    return [Pair("everyday", zh, en) for _, zh, en in (line.split("\t") for line in lines)]
