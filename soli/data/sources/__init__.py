"""The packages a Chinese-English corpus is made of: each source names its packages and reads them in one small function."""

from soli.data.sources.catalogue import SOURCES, Row, Source

__all__ = ["SOURCES", "Row", "Source"]
