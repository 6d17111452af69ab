"""Both seams on packed weights, in plain torch: a matrix is written out in the dtype of the input just before its
product and let go after it, so memory holds one matrix beside the packed ones. No gradient reaches a packed weight.

Shapes: T tokens, D hidden, E experts, F expert width, K chosen, P = T*K pairs of token and expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from soli.errors import SoliError
from soli.formats.quantized import PackedWeight
from soli.kernels import torch_linear
from soli.kernels.sorted_experts import dispatch


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The experts of a layer, each where it lies: `gates` and `ups` (F, D), `downs` (D, F), one of each per expert."""

    gates: tuple[PackedWeight, ...]
    ups: tuple[PackedWeight, ...]
    downs: tuple[PackedWeight, ...]

    def __post_init__(self) -> None:
        if not len(self.gates) == len(self.ups) == len(self.downs):
            raise SoliError(
                f"a layer has {len(self.gates)} gates, {len(self.ups)} ups and {len(self.downs)} downs; "
                "every expert needs one of each"
            )


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the packed weight (out, in) transposed, in the dtype of x."""
    return torch_linear.linear(x, weight.dequantize(x.dtype), bias)


def experts(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, packed: PackedExperts) -> Tensor:
    """Equation 12's routed part, (T, D), (T, K), (T, K) to (T, D): only the experts that were chosen are read."""

    def run(x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor) -> Tensor:
        counts = counts_E.tolist()
        runs = zip(x_PD.split(counts), weights_P1.split(counts), packed.gates, packed.ups, packed.downs, strict=True)
        parts = []
        for rows, weights, gate, up, down in runs:
            if rows.shape[0]:
                parts.append(linear(F.silu(linear(rows, gate)) * linear(rows, up) * weights, down))
        return torch.cat(parts) if parts else x_PD

    return dispatch(x_TD, expert_ids_TK, weights_TK, len(packed.gates), run)
