"""The one thing a source yields: a pair, or a line of one language."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from soli.recipes.nano_corpus.cleaning import align

Key = TypeVar("Key")


class SourceRow(NamedTuple):
    """A pair has both sides; a line of one language leaves the other side empty. `tag` names a part of the source."""

    zh: str
    en: str
    tag: str = ""


def rows_by_key(
    chinese: Mapping[Key, str], english: Mapping[Key, str], simplify: Callable[[str], str] = str
) -> Iterator[SourceRow]:
    """Pairs of the texts that have one key in both languages, split into sentences where both have as many."""
    for key, text in chinese.items():
        for zh, en in align(text, english[key]) if key in english else ():
            yield SourceRow(simplify(zh), en)
