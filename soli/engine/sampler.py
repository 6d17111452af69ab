"""From logits to the next token: greedy, or temperature, top-k and top-p with a random stream per request.

A request draws exactly one uniform number per token from its own generator and inverts the cumulative distribution
with it, so what it draws depends on its seed and its logits alone, never on its neighbours in the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soli.errors import SoliError


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks tokens. temperature 0 is greedy; top_k 0 and top_p 1 leave the vocabulary whole.

    seed None draws a fresh one for every run. Refuses values outside their range with a SoliError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SoliError(
                f"temperature is {self.temperature}: give a number from 0 (always the likeliest token) upward"
            )
        if self.top_k < 0:
            raise SoliError(f"top_k is {self.top_k}: give 0 for the whole vocabulary, or how many tokens to keep")
        if not 0 < self.top_p <= 1:
            raise SoliError(f"top_p is {self.top_p}: give a share above 0 and up to 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise SoliError(f"seed is {self.seed}: give a whole number from 0 to 2**63 - 1")


GREEDY = SamplingParams()


class Sampler:
    """Draws tokens for a fixed list of requests, each with its own parameters and random stream."""

    def __init__(self, params: Sequence[SamplingParams]) -> None:
        self._params = list(params)
        self._generators = [_generator(p.seed) for p in self._params]

    def draw(self, logits_BV: Tensor, requests: Sequence[int]) -> list[int]:
        """One token for each row of logits; row b belongs to request number `requests[b]`.

        Computed in float32 (greedy) and float64 (sampling) whatever the model's dtype. Refuses logits that are not
        finite.
        """
        logits_BV = logits_BV.float()
        if not bool(torch.isfinite(logits_BV).all()):
            raise SoliError("the model's logits are not finite: its weights are broken, or float16/bfloat16 overflowed")
        tokens = logits_BV.argmax(dim=-1).tolist()
        warm = [row for row, request in enumerate(requests) if self._params[request].temperature > 0]
        if warm:
            drawn = self._draw_warm(logits_BV[warm].cpu(), [requests[row] for row in warm])
            for row, token in zip(warm, drawn, strict=True):
                tokens[row] = token
        return tokens

    def _draw_warm(self, logits_BV: Tensor, requests: Sequence[int]) -> list[int]:
        params = [self._params[request] for request in requests]
        probabilities_BV, tokens_BV = nucleus(logits_BV, params)
        uniform = [torch.rand((), generator=self._generators[request], dtype=torch.float64) for request in requests]
        cumulative_BV = probabilities_BV.cumsum(dim=-1)
        target_B1 = torch.stack(uniform)[:, None] * cumulative_BV[:, -1:]
        # right=True: the first token whose cumulative share exceeds the draw, so a token of probability 0 is never
        # picked.
        ranks_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
        last_B1 = (probabilities_BV > 0).sum(dim=-1, keepdim=True) - 1
        return tokens_BV.gather(1, torch.minimum(ranks_B1, last_B1))[:, 0].tolist()


def nucleus(logits_BV: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Probabilities (float64) in descending order, zero outside top-k and then top-p, and the tokens in that order.

    Order of the filters is that of `transformers`: temperature, top-k, then top-p over what top-k left. The likeliest
    token always stays.
    """
    temperature_B1 = torch.tensor([p.temperature for p in params], dtype=torch.float64)[:, None]
    top_p_B1 = torch.tensor([p.top_p for p in params], dtype=torch.float64)[:, None]
    top_k_B1 = torch.tensor([p.top_k or logits_BV.shape[-1] for p in params])[:, None]
    sorted_BV, tokens_BV = logits_BV.double().sort(dim=-1, descending=True, stable=True)
    outside_BV = torch.arange(sorted_BV.shape[-1])[None] >= top_k_B1
    # Measured from the largest logit, so that a temperature near 0 cannot overflow.
    scaled_BV = (sorted_BV - sorted_BV[:, :1]) / temperature_B1
    probabilities_BV = scaled_BV.masked_fill(outside_BV, -torch.inf).softmax(dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    probabilities_BV = probabilities_BV.masked_fill((before_BV >= top_p_B1) & (before_BV > 0), 0.0)
    return probabilities_BV, tokens_BV


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
