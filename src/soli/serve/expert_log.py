"""What each expert has played since the server started, from the tokens whose routing somebody asked for.

Per expert: how often it played, for which kinds of tokens, and the tokens it played with the highest weight, each with
a little of the text around it. Bounded: counts and TOP tokens per expert.
"""

import heapq
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from soli.analysis.trace import TokenTrace
from soli.recipes.nano_corpus.cleaning import han

TOP = 32
KINDS = ("chinese", "english", "digits", "punctuation", "other")
AROUND = 3


@dataclass
class _Played:
    plays: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    top: list[tuple[float, int, tuple[str, str, str]]] = field(default_factory=list)  # a heap, the lightest first


class ExpertLog:
    """May be written and read from several threads."""

    def __init__(self) -> None:
        self._played: dict[tuple[str, int], _Played] = {}
        self._read = 0
        self._lock = threading.Lock()

    def add(self, tokens: Sequence[TokenTrace], texts: Sequence[str]) -> None:
        """`tokens` were read; `texts` are all tokens of their text, by position."""
        with self._lock:
            for token in tokens:
                self._read += 1
                at = token.position
                shown = ("".join(texts[max(0, at - AROUND) : at]), token.text, "".join(texts[at + 1 : at + 1 + AROUND]))
                kind = kind_of(token.text)
                for layer in token.layers:
                    for selected in layer.selected:
                        played = self._played.setdefault((layer.layer, selected.expert), _Played())
                        played.plays += 1
                        played.kinds[kind] += 1
                        entry = (selected.weight, self._read, shown)
                        if len(played.top) < TOP:
                            heapq.heappush(played.top, entry)
                        elif entry > played.top[0]:
                            heapq.heapreplace(played.top, entry)

    def about(self, layer: str, expert: int, limit: int) -> dict[str, Any]:
        """One expert, as GET /soli/experts answers; the heaviest tokens first."""
        with self._lock:
            played = self._played.get((layer, expert), _Played())
            best = sorted(played.top, reverse=True)[:limit]
            return {
                "layer": layer,
                "expert": expert,
                "plays": played.plays,
                "read": self._read,
                "tokens": [
                    {"text": text, "weight": weight, "before": before, "after": after}
                    for weight, _, (before, text, after) in best
                ],
                "kinds": {kind: played.kinds[kind] for kind in KINDS},
            }


def kind_of(text: str) -> str:
    """What a token mostly is: one of KINDS."""
    bare = text.strip()
    if han(bare):
        return "chinese"
    if any(character.isdigit() for character in bare):
        return "digits"
    if any(character.isascii() and character.isalpha() for character in bare):
        return "english" if not bare.startswith("<|") else "other"
    if bare and all(not character.isalnum() and character.isprintable() for character in bare) and "⟨" not in bare:
        return "punctuation"
    return "other"
