"""From one row of logits to the distribution that a token is drawn from, and to log-probabilities.

The distribution: temperature, then top-k, top-p and min-p, in the order of `transformers`, each filter over what the
one before left. A filter keeps every token at or above a weight, so that of tokens with equal weights all are kept or
none, and the outcome does not depend on how ties sort. One row at a time, in float64: a row's rounding does not depend
on its neighbours.

Log-probabilities are those of the model itself: log softmax of its logits, before penalties, bias, temperature and
filters, as vLLM gives them by default ("raw_logprobs").

Shapes: V vocabulary, K tokens that pass the filters.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 1024  # probabilities summed at once while a token is drawn
SMALLEST = float(np.finfo(np.float64).tiny)  # of weights, where the likeliest token's is 1: less is never drawn


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
        block = _index_at(cumulative, target)
        before = float(cumulative[block - 1]) if block else 0.0
        inside = self.probabilities_K[block * BLOCK : (block + 1) * BLOCK].cumsum()
        return int(self.tokens_K[block * BLOCK + _index_at(inside, target - before)])

    def probability(self, token: int) -> float:
        """Probability of one token; 0 for one that was filtered out."""
        index = int(np.searchsorted(self.tokens_K, token))
        present = index < len(self.tokens_K) and int(self.tokens_K[index]) == token
        return float(self.probabilities_K[index]) if present else 0.0


def distribution(
    logits_V: NDArray[np.float32], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Distribution:
    """The distribution over processed logits, at least one of which is finite; -inf is a token that must not come.

    Temperature 0 gives the likeliest token alone, the lowest of equals; `top_k` 0, `top_p` 1, `min_p` 0: no filter.
    """
    if temperature == 0:
        return Distribution(np.array([logits_V.argmax()]), np.ones(1))
    candidates = _top_k(logits_V, top_k)
    # Relative to the largest logit, so that a temperature near 0 cannot overflow to inf - inf.
    weights_K = logits_V[candidates].astype(np.float64)
    weights_K -= float(logits_V.max())
    with np.errstate(over="ignore"):
        weights_K /= temperature
    np.exp(weights_K, out=weights_K)
    nucleus = _nucleus_threshold(weights_K, top_p) if top_p < 1 else 0.0
    index_K = np.flatnonzero(weights_K >= max(nucleus, min_p, SMALLEST))  # the likeliest token's weight is 1
    weights_K = weights_K[index_K]
    weights_K /= weights_K.sum()
    return Distribution(index_K if isinstance(candidates, slice) else candidates[index_K], weights_K)


def _index_at(cumulative: NDArray[np.float64], target: float) -> int:
    """The index whose share, [before, after), contains `target`."""
    return min(int(np.searchsorted(cumulative, target, side="right")), len(cumulative) - 1)


def _top_k(logits_V: NDArray[np.float32], k: int) -> NDArray[np.int64] | slice:
    """The tokens at or above the k-th largest logit; all, as a slice, when k is 0."""
    size = len(logits_V)
    if not 0 < k < size:
        return slice(None)
    return np.flatnonzero(logits_V >= np.partition(logits_V, size - k)[size - k])


def _nucleus_threshold(weights_K: NDArray[np.float64], top_p: float) -> float:
    """The smallest weight in the smallest set of largest weights that holds `top_p` of their sum."""
    total = float(weights_K.sum())
    # The weights below (1 - top_p) of the mean sum to less than 1 - top_p of the total: no need to sort them.
    candidates = weights_K[weights_K >= (1 - top_p) * total / len(weights_K) * (1 - 1e-9)]
    descending = np.sort(candidates)[::-1]
    last = int(np.searchsorted(descending.cumsum(), top_p * total))
    return float(descending[min(last, len(descending) - 1)])


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and the likeliest tokens with theirs, best first (the lower id of equals)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits_V: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
    """Of `token` and of the `count` likeliest tokens, computed in float64."""
    double_V = logits_V.astype(np.float64)
    largest = double_V.max()
    log_sum = largest + np.log(np.exp(double_V - largest).sum())
    return TokenLogprob(
        token,
        float(double_V[token] - log_sum),
        tuple((top_token, float(double_V[top_token] - log_sum)) for top_token in _likeliest(logits_V, count)),
    )


def _likeliest(logits_V: NDArray[np.float32], count: int) -> list[int]:
    """The tokens of the `count` largest logits, largest first."""
    size = len(logits_V)
    count = min(count, size)
    if count == 0:
        return []
    tokens = np.flatnonzero(logits_V >= np.partition(logits_V, size - count)[size - count])
    order = np.argsort(-logits_V[tokens], kind="stable")
    return [int(token) for token in tokens[order][:count]]
