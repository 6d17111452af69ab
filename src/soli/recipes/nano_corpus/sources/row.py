"""The one thing a source yields: a pair, or a line of one language."""

from __future__ import annotations

from typing import NamedTuple


class SourceRow(NamedTuple):
    """A pair has both sides; a line of one language leaves the other side empty. `tag` names a part of the source."""

    zh: str
    en: str
    tag: str = ""
