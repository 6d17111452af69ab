"""The packages a Chinese-English corpus is made of: each source names its packages and a small function reads them."""

from soli.recipes.nano_corpus.sources.catalogue import SOURCES
from soli.recipes.nano_corpus.sources.row import SourceRow
from soli.recipes.nano_corpus.sources.source import Source

__all__ = ["SOURCES", "Source", "SourceRow"]
