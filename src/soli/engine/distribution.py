"""From one row of logits to the distribution that a token is drawn from: temperature, then top-k, top-p and min-p.

The order is that of `transformers`, each filter over what the one before left. Every filter keeps the tokens at or
above a weight, so tokens as likely as the last one kept are kept with it, and the outcome never hangs on how ties sort.
One row at a time, in float64: a row's rounding does not depend on its neighbours.

Shapes: V vocabulary, K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from soli.engine.sampler import SamplingParams

BLOCK = 1024
SMALLEST = float(np.finfo(np.float64).tiny)  # beside the likeliest token's 1: less is never drawn


@dataclass(frozen=True)
class Distribution:
    """The tokens that can be drawn, in ascending order, and their probabilities, all above 0 and 1 in sum."""

    tokens_K: NDArray[np.int64]
    probabilities_K: NDArray[np.float64]

    def draw(self, uniform: float) -> int:
        """The token at `uniform` (0 up to but not 1) of the cumulative distribution."""
        # In blocks, because a running sum over a whole vocabulary takes longer than all else here together.
        cumulative = np.add.reduceat(self.probabilities_K, np.arange(0, len(self.tokens_K), BLOCK)).cumsum()
        target = uniform * float(cumulative[-1])  # the sum is 1 but for rounding
        block = _place(cumulative, target)
        before = float(cumulative[block - 1]) if block else 0.0
        inside = self.probabilities_K[block * BLOCK : (block + 1) * BLOCK].cumsum()
        return int(self.tokens_K[block * BLOCK + _place(inside, target - before)])

    def probability(self, token: int) -> float:
        """Probability of one token; 0 for one that was filtered out."""
        place = int(np.searchsorted(self.tokens_K, token))
        found = place < len(self.tokens_K) and int(self.tokens_K[place]) == token
        return float(self.probabilities_K[place]) if found else 0.0


def distribution(logits_V: NDArray[np.float32], params: SamplingParams) -> Distribution:
    """What `params` makes of processed logits; -inf is a token that must not come, and one at least is finite.

    Temperature 0 gives the likeliest token alone, the lowest of equals.
    """
    if params.temperature == 0:
        return Distribution(np.array([logits_V.argmax()]), np.ones(1))
    among = _likeliest(logits_V, params.top_k)
    # Measured from the largest logit, so that a temperature near 0 cannot overflow to inf - inf.
    weights_K = logits_V[among].astype(np.float64)
    weights_K -= float(logits_V.max())
    with np.errstate(over="ignore"):
        weights_K /= params.temperature
    np.exp(weights_K, out=weights_K)
    floor = _nucleus_floor(weights_K, params.top_p) if params.top_p < 1 else 0.0
    kept_K = np.flatnonzero(weights_K >= max(floor, params.min_p, SMALLEST))  # the likeliest token weighs 1
    weights_K = weights_K[kept_K]
    weights_K /= weights_K.sum()
    return Distribution(kept_K if isinstance(among, slice) else among[kept_K], weights_K)


def _place(cumulative: NDArray[np.float64], target: float) -> int:
    """Where `target` falls: a share is [before, after)."""
    return min(int(np.searchsorted(cumulative, target, side="right")), len(cumulative) - 1)


def _likeliest(logits_V: NDArray[np.float32], k: int) -> NDArray[np.int64] | slice:
    """The tokens at or above the k-th largest logit; all, as a slice, when k is 0."""
    size = len(logits_V)
    if not 0 < k < size:
        return slice(None)
    return np.flatnonzero(logits_V >= np.partition(logits_V, size - k)[size - k])


def _nucleus_floor(weights_K: NDArray[np.float64], top_p: float) -> float:
    """The smallest weight in the smallest set of largest weights that holds `top_p` of their sum."""
    total = float(weights_K.sum())
    # All the weights below (1 - top_p) of the mean together hold less than is left out: no need to sort them.
    candidates = weights_K[weights_K >= (1 - top_p) * total / len(weights_K) * (1 - 1e-9)]
    descending = np.sort(candidates)[::-1]
    last = int(np.searchsorted(descending.cumsum(), top_p * total))
    return float(descending[min(last, len(descending) - 1)])
