"""Log-probabilities of drawn tokens and their alternatives.

They are those of the model itself: log softmax of its logits, before penalties, bias, temperature and filters, as
vLLM gives them by default ("raw_logprobs"). So they say what the model believed, and do not change with how a token
was picked.

Shapes: V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and the likeliest tokens with theirs, best first (the lower id of equals)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits_V: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
    """Of `token` and of the `count` likeliest tokens, computed in float64."""
    wide_V = logits_V.astype(np.float64)
    largest = wide_V.max()
    log_sum = largest + np.log(np.exp(wide_V - largest).sum())
    return TokenLogprob(
        token,
        float(wide_V[token] - log_sum),
        tuple((best, float(wide_V[best] - log_sum)) for best in _likeliest(logits_V, count)),
    )


def _likeliest(logits_V: NDArray[np.float32], count: int) -> list[int]:
    size = len(logits_V)
    count = min(count, size)
    if count == 0:
        return []
    tokens = np.flatnonzero(logits_V >= np.partition(logits_V, size - count)[size - count])
    order = np.argsort(-logits_V[tokens], kind="stable")
    return [int(token) for token in tokens[order][:count]]
