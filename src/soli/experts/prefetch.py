"""Whether experts of the next layer are read ahead: tried against doing without, and done only while it pays.

A guess is which experts the next layer's router would choose for this layer's hidden state. A right guess is read while
this layer is computed; a wrong one takes a slot, and the block of it that is being read delays what is needed. Which
weighs more depends on disk, model and text, so both ways take turns, for TRIAL passes each, and the faster one, by its
median pass, is kept for KEEP passes. Turns are short: a cache that fills up meanwhile is as full for both.
"""

from dataclasses import dataclass, field
from statistics import median
from typing import Final

TRIAL: Final = 24  # passes each way
TURN: Final = 4
KEEP: Final = 512
MIN_GAIN: Final = 0.01  # of the time of a pass, below which it is left off


@dataclass
class PrefetchStats:
    """Experts: `guessed` and read or queued, `used` by the next layer, `cancelled` before a byte was read. `enabled`:
    whether guesses are read now, `trials` how often that was decided."""

    guessed: int = 0
    used: int = 0
    cancelled: int = 0
    enabled: bool = True
    trials: int = 0

    @property
    def precision(self) -> float:
        """Of the guesses, the share that the next layer chose."""
        return self.used / self.guessed if self.guessed else 0.0


@dataclass
class Prefetcher:
    """Decides between reading ahead and not. `mode`: "auto", or "on" and "off" for measurements."""

    mode: str = "auto"
    stats: PrefetchStats = field(default_factory=PrefetchStats)

    def __post_init__(self) -> None:
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._left = 0  # passes until the next trial
        self.stats.enabled = self.mode != "off"

    @property
    def enabled(self) -> bool:
        """Whether the next pass reads ahead."""
        return self.stats.enabled

    def observe(self, seconds: float) -> None:
        """A pass of a few tokens that had to wait for experts took so long."""
        if self.mode != "auto":
            return
        if self._left:
            self._left -= 1
            return
        self._seconds[self.enabled].append(seconds)
        if len(self._seconds[self.enabled]) % TURN == 0:
            self.stats.enabled = not self.enabled
        if min(map(len, self._seconds.values())) < TRIAL:
            return
        with_guesses, without = median(self._seconds[True]), median(self._seconds[False])
        self.stats.enabled = with_guesses < (1 - MIN_GAIN) * without
        self.stats.trials += 1
        self._seconds = {True: [], False: []}
        self._left = KEEP
