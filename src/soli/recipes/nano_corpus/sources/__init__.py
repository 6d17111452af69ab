"""The packages a Chinese-English corpus is made of: each source names its packages and a small function reads them."""

from soli.recipes.nano_corpus.sources.catalogue import SOURCES, Source, SourceRow

__all__ = ["SOURCES", "Source", "SourceRow"]
