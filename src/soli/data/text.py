"""What text is compared and counted by: when two texts are the same, the held-out split, Han characters, language."""

import re
from hashlib import blake2b
from typing import Literal

_SPACE = re.compile(r"\s+")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")

Language = Literal["en", "zh"]


def comparison_key(text: str) -> str:
    """The form in which two texts count as the same: case, white space and closing punctuation do not matter."""
    return _SPACE.sub("", text).casefold().rstrip(".。…!！?？:：;；,，")


def is_held_out(text: str, every: int) -> bool:
    """Whether a hash holds this text out: one in `every`, the same on every machine and for every spelling."""
    digest = blake2b(comparison_key(text).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % every == 0


def count_han(text: str) -> int:
    """Number of Chinese characters."""
    return len(_HAN.findall(text))


def language_of(text: str) -> Language | None:
    """`zh` with at least as many Han characters as Latin words, `en` with fewer, None with neither."""
    characters, words = count_han(text), len(_WORD.findall(text))
    if not characters and not words:
        return None
    return "zh" if characters >= words else "en"
