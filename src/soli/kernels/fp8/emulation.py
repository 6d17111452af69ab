"""The seam in the FP8 of the paper (section 3.3), by exact emulation: all three products of a linear layer in E4M3.

    y      = x w^T       x in 1x128 tiles along I,           w in 128x128 blocks
    grad_x = grad_y w    grad_y in 1x128 tiles along O,      the same blocks
    grad_w = grad_y^T x  both in tiles of 128 along tokens, x requantized from the saved FP8 form

Operands are quantized, dequantized and multiplied in fp32, so every product is what FP8 hardware with fp32 accumulation
gives up to the order of the sum; results are rounded once to the dtype of x, the weight's gradient to that of the
weight (fp32 masters). What is saved for the backward pass is saved in FP8. Every device can run this emulation: it
shows what FP8 does to a loss and saves no time. `cuda.py` is the same on FP8 hardware.

# differs: the paper keeps the inputs of the projection after attention in E5M6 with power-of-two scales; here they are
# E4M3 with fp32 scales like all others.

Shapes: T rows (tokens), I input and O output features, P pairs of token and expert.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from soli.formats.fp8 import dequantize, dequantize_tiles, quantize, quantize_tiles
from soli.kernels.torch_backend import TorchBackend, by_expert, dispatch_and_combine


class Fp8Emulation(TorchBackend):
    """Linear layers and experts in FP8 on any device; the rest is torch's."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., I) times weight (O, I) transposed, in FP8; the bias is added in the dtype of x.

        SoliError when the weight holds values that are not finite.
        """
        y = _EmulatedProduct.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias.to(x.dtype)

    def experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """One call of `linear` per product and selected expert. Tiles along tokens stay within one expert's rows."""

        def mlp(rows: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            gate, up = self.linear(rows, gate_up).chunk(2, dim=-1)
            return self.linear(F.silu(gate) * up * weights, down)

        def run(x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor) -> Tensor:
            return by_expert(mlp, x_PD, weights_P1, counts_E, gate_up_E2FD.unbind(0), down_EDF.unbind(0))

        return dispatch_and_combine(x_TD, expert_ids_TK, weights_TK, gate_up_E2FD.shape[0], run)


class _EmulatedProduct(torch.autograd.Function):
    """The three products of one linear layer."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        x = quantize_tiles(x_TI)
        weight = quantize(weight_OI)
        ctx.save_for_backward(*x, *weight)
        ctx.dtypes = x_TI.dtype, weight_OI.dtype
        return (dequantize_tiles(*x) @ dequantize(*weight, torch.float32).T).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor]:
        x_values, x_scale, weight_values, weight_scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        weight_OI = dequantize(weight_values, weight_scale, torch.float32)
        grad_x_TI = _through_tiles(grad_TO) @ weight_OI
        x_IT = _through_tiles(dequantize_tiles(x_values, x_scale).T)
        grad_weight_OI = _through_tiles(grad_TO.T) @ x_IT.T
        return grad_x_TI.to(x_dtype), grad_weight_OI.to(weight_dtype)


def _through_tiles(matrix: Tensor) -> Tensor:
    """A matrix through 1x128 tiles along its rows and back, in fp32."""
    return dequantize_tiles(*quantize_tiles(matrix))
