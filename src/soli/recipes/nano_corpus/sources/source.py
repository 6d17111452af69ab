"""What a source of the corpus is: named packages and a function that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from soli.recipes.nano_corpus.fetch import Package
from soli.recipes.nano_corpus.sources.row import SourceRow

Reader = Callable[[list[Path]], Iterator[SourceRow]]


@dataclass(frozen=True)
class Source:
    """`kind` is `pairs`, `dictionary` (pairs without a length ratio), `en` or `zh` (text of one language)."""

    name: str
    kind: str
    packages: tuple[Package, ...]
    read: Reader
    licence: str

    @property
    def is_pairs(self) -> bool:
        return self.kind in ("pairs", "dictionary")

    @property
    def label(self) -> str:
        """The name in recipes and tables; text of one language carries its language: `libreoffice-help (en)`."""
        return self.name if self.is_pairs else f"{self.name} ({self.kind})"
