"""Which of the two languages a text is in, by its script: Han characters weighed against Latin words."""

import re
from typing import Literal

from soli.data.text import count_han

_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")

Language = Literal["en", "zh"]


def language_of(text: str) -> Language | None:
    """`zh` with at least as many Han characters as Latin words, `en` with fewer, None with neither."""
    characters, words = count_han(text), len(_WORD.findall(text))
    if not characters and not words:
        return None
    return "zh" if characters >= words else "en"
