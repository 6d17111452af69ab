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


@dataclass(frozen=True)
class Distribution:
    """The tokens that can be drawn, in ascending order, and their probabilities, all above 0 and 1 in sum."""

    tokens_K: NDArray[np.int64]
    probabilities_K: NDArray[np.float64]

    def draw(self, uniform: float) -> int:
        """The token at `uniform` (0 up to but not 1) of the cumulative distribution."""
        cumulative_K = self.probabilities_K.cumsum()
        # Scaled by the last sum, which rounding leaves near 1; "right", so that a token's share is [before, after).
        place = int(np.searchsorted(cumulative_K, uniform * cumulative_K[-1], side="right"))
        return int(self.tokens_K[min(place, len(self.tokens_K) - 1)])

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
    # Measured from the largest logit, so that a temperature near 0 cannot overflow to inf - inf.
    scaled_V = logits_V.astype(np.float64) - float(logits_V.max())
    outside_V = scaled_V < _kth_largest(scaled_V, params.top_k)
    with np.errstate(over="ignore"):
        scaled_V /= params.temperature
    weights_V = np.exp(scaled_V)
    weights_V[outside_V] = 0
    if params.top_p < 1:
        weights_V[weights_V < _nucleus_floor(weights_V, params.top_p)] = 0
    weights_V[weights_V < params.min_p] = 0  # the likeliest token weighs 1
    tokens_K = np.flatnonzero(weights_V)
    weights_K = weights_V[tokens_K]
    return Distribution(tokens_K, weights_K / weights_K.sum())


def _kth_largest(values_V: NDArray[np.float64], k: int) -> float:
    """The k-th largest value; -inf when k is 0 or keeps everything."""
    size = len(values_V)
    return float(np.partition(values_V, size - k)[size - k]) if 0 < k < size else -np.inf


def _nucleus_floor(weights_V: NDArray[np.float64], top_p: float) -> float:
    """The smallest weight in the smallest set of largest weights that holds `top_p` of their sum."""
    descending_K = np.sort(weights_V[weights_V > 0])[::-1]
    cumulative_K = descending_K.cumsum()
    last = int(np.searchsorted(cumulative_K, top_p * cumulative_K[-1]))
    return float(descending_K[min(last, len(descending_K) - 1)])
