"""Both seams on quantized weights, in plain torch: a matrix is written out in the dtype of the input just before its
product and let go after it, so memory holds one matrix beside the quantized ones. No gradient reaches a quantized
weight.

Shapes: T tokens, D hidden, E experts, F expert width, K chosen, P = T*K pairs of token and expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from soli.errors import SoliError
from soli.formats.quantized import QuantizedWeight
from soli.kernels import torch_linear
from soli.kernels.sorted_experts import dispatch


@dataclass(frozen=True, eq=False)
class QuantizedExperts:
    """The experts of a layer, each where it lies: `gates` and `ups` (F, D), `downs` (D, F), one of each per expert."""

    gates: tuple[QuantizedWeight, ...]
    ups: tuple[QuantizedWeight, ...]
    downs: tuple[QuantizedWeight, ...]

    def __post_init__(self) -> None:
        if not len(self.gates) == len(self.ups) == len(self.downs):
            raise SoliError(
                f"a layer has {len(self.gates)} gates, {len(self.ups)} ups and {len(self.downs)} downs; "
                "every expert needs one of each"
            )


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the quantized weight (out, in) transposed, in the dtype of x."""
    return torch_linear.linear(x, weight.dequantize(x.dtype), bias)


def experts(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, quantized: QuantizedExperts) -> Tensor:
    """Equation 12's routed part, (T, D), (T, K), (T, K) to (T, D): only the experts that were chosen are read."""

    def run(x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor) -> Tensor:
        counts = counts_E.tolist()
        stacks = quantized.gates, quantized.ups, quantized.downs
        runs = zip(x_PD.split(counts), weights_P1.split(counts), *stacks, strict=True)
        parts = []
        for rows, weights, gate, up, down in runs:
            if rows.shape[0]:
                parts.append(linear(F.silu(linear(rows, gate)) * linear(rows, up) * weights, down))
        return torch.cat(parts) if parts else x_PD

    return dispatch(x_TD, expert_ids_TK, weights_TK, len(quantized.gates), run)
