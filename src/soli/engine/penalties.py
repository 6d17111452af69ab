"""Penalties for tokens that stand in the text already, and logit bias: what changes logits before sampling.

    repetition r   logit / r where positive, logit * r where negative, for tokens of the prompt or of the answer
                   (Keskar et al. 2019, section 4.1; `transformers`' RepetitionPenaltyLogitsProcessor)
    frequency f    logit - f * (times the token was sampled)            both over the answer alone, as in
    presence p     logit - p * (1 if it was sampled at all)             OpenAI's API reference
    bias b         logit + b

in this order, so that the repetition penalty sees the sign of the model's own logit.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from soli.engine.sampler import SamplingParams

LARGEST = float(np.finfo(np.float32).max)


class Penalties:
    """What one request's penalties and bias do to its logits; counts its tokens as they are accepted."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab: int) -> None:
        self._params = params
        self._bias_tokens = np.array(list(params.logit_bias), dtype=np.int64)
        self._biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._counts_V = np.zeros(vocab, dtype=np.int32)
        self._prompt_V = np.zeros(vocab, dtype=np.bool_)
        self._prompt_V[np.asarray(prompt_ids, dtype=np.int64)] = True

    def count(self, token: int, times: int) -> None:
        """The answer holds `times` more (or, below 0, fewer) of this token."""
        self._counts_V[token] += times

    def apply(self, logits_V: NDArray[np.float32]) -> None:
        """Changes the logits in place, in float32; finite ones stay finite."""
        with np.errstate(over="ignore"):
            self._apply(logits_V)

    def _apply(self, logits_V: NDArray[np.float32]) -> None:
        params, sampled_V = self._params, self._counts_V > 0
        if params.repetition_penalty != 1:
            tokens = np.flatnonzero(self._prompt_V | sampled_V)
            seen = logits_V[tokens]
            logits_V[tokens] = np.where(seen < 0, seen * params.repetition_penalty, seen / params.repetition_penalty)
        if params.frequency_penalty or params.presence_penalty:
            tokens = np.flatnonzero(sampled_V)
            logits_V[tokens] -= params.frequency_penalty * self._counts_V[tokens] + params.presence_penalty
        logits_V[self._bias_tokens] += self._biases
        # Only logits that were absurd before come here; infinite ones would make every probability undefined.
        np.clip(logits_V, -LARGEST, LARGEST, out=logits_V)
