"""Both seams in the FP8 of the paper (section 3.3), by exact emulation: all three products of a linear layer in E4M3.

    y      = x w^T       x in 1x128 tiles along I,           w in 128x128 blocks
    grad_x = grad_y w    grad_y in 1x128 tiles along O,      the same blocks
    grad_w = grad_y^T x  both in tiles of 128 along tokens, x anew from the FP8 form that was kept

Operands are quantised, dequantised and multiplied in fp32, so every product is what FP8 hardware with fp32 accumulation
gives up to the order of the sum; results are rounded once to the dtype of x, the weight's gradient to that of the
weight (fp32 masters). What waits for the backward pass waits in FP8. Every device can run this emulation: it shows what
FP8 does to a loss and saves no time. `fp8_cuda` is the same on FP8 hardware.

# differs: the paper keeps the inputs of the projection after attention in E5M6 with power-of-two scales; here they are
# E4M3 with fp32 scales like all others.

Shapes: T rows (tokens), I input and O output features, P pairs of token and expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from soli.formats.fp8 import Packed, Tiles, pack, pack_tiles, unpack, unpack_tiles
from soli.kernels.sorted_experts import dispatch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) times weight (O, I) transposed, in FP8; the bias is added in the dtype of x.

    SoliError when the weight holds values that are not finite.
    """
    y = _Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias.to(x.dtype)


def experts(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    linear: Callable[[Tensor, Tensor], Tensor] = linear,
) -> Tensor:
    """The experts seam in FP8: (T, D), (T, K), (T, K) to (T, D). Tiles along tokens stay within one expert's rows.

    One call of `linear` per product and expert that was chosen.
    """

    def run(x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor) -> Tensor:
        counts = counts_E.tolist()
        runs = zip(
            x_PD.split(counts), weights_P1.split(counts), gate_up_E2FD.unbind(0), down_EDF.unbind(0), strict=True
        )
        parts = []
        for rows, weights, gate_up, down in runs:
            if rows.shape[0]:
                gate, up = linear(rows, gate_up).chunk(2, dim=-1)
                parts.append(linear(F.silu(gate) * up * weights, down))
        return torch.cat(parts) if parts else x_PD

    return dispatch(x_TD, expert_ids_TK, weights_TK, gate_up_E2FD.shape[0], run)


class _Product(torch.autograd.Function):
    """The three products of one linear layer."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        x, weight = pack_tiles(x_TI), pack(weight_OI)
        ctx.save_for_backward(x.codes_TI, x.scale_TQ, weight.codes_OI, weight.scale_PQ)
        ctx.dtypes = x_TI.dtype, weight_OI.dtype
        return (unpack_tiles(x) @ unpack(weight, torch.float32).T).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor]:
        x_codes, x_scale, weight_codes, weight_scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        weight_OI = unpack(Packed(weight_codes, weight_scale), torch.float32)
        grad_x_TI = _through_tiles(grad_TO) @ weight_OI
        x_IT = _through_tiles(unpack_tiles(Tiles(x_codes, x_scale)).T)
        grad_weight_OI = _through_tiles(grad_TO.T) @ x_IT.T
        return grad_x_TI.to(x_dtype), grad_weight_OI.to(weight_dtype)


def _through_tiles(matrix: Tensor) -> Tensor:
    """What is left of a matrix, in fp32, after 1x128 tiles along its rows."""
    return unpack_tiles(pack_tiles(matrix))
