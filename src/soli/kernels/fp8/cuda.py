"""FP8 training through a GPU's own FP8 products: what `emulation.py` emulates, on Hopper with CUDA 12.9 or newer.

The three products of a linear layer (paper, section 3.3) are one `scaled_mm` each:

    y      = x w^T       x in 1x128 tiles along I,  w in 128x128 blocks
    grad_x = grad_y w    grad_y in 1x128 tiles along O, the same blocks, transposed
    grad_w = grad_y^T x  both in 1x128 tiles along tokens, x requantized from the saved FP8 form

The experts of a layer are one Triton launch per product where all sides are multiples of 128, tokens sorted by expert
and each expert's rows padded to 128, so that no tile spans two; nothing is read back to the host. Else they are one
`scaled_mm` per selected expert. Tensor cores add up to 128 products in less than fp32; sums of those are fp32.

Shapes: T rows (tokens), I input and O output features, K selected, P = T*K pairs, U rows of all experts' tiles.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from soli.formats.fp8 import BLOCK
from soli.kernels.fp8.emulation import Fp8Emulation
from soli.kernels.fp8.operands import Operand, blocks, has_triton, product, retiled, tiles
from soli.kernels.torch_backend import count_tokens


def missing_requirement(device: torch.device) -> str | None:
    """Why this device cannot multiply in FP8, in words; None where it can."""
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if not hasattr(F, "scaled_mm"):
        return "PyTorch is older than 2.10"
    if torch.version.cuda is None or tuple(int(n) for n in torch.version.cuda.split(".")[:2]) < (12, 9):
        return f"PyTorch is built for CUDA {torch.version.cuda}, not 12.9 or newer"
    if torch.cuda.get_device_capability(device)[0] != 9:  # torch offers these block scales on Hopper alone
        return f"{torch.cuda.get_device_name(device)} is no Hopper GPU"
    return None


class Fp8Cuda(Fp8Emulation):
    """Linear layers and experts in FP8 on a Hopper GPU; the rest is torch's."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., I) times weight (O, I) transposed, in FP8, in the dtype of x; the bias is added after."""
        y = _HopperProduct.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias.to(x.dtype)

    def experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """Tiles along tokens stay within one expert's rows. Without Triton, or with sides that are no multiples of 128,
        one product per selected expert."""
        E, D, width = down_EDF.shape
        if D % BLOCK or width % BLOCK or not has_triton():
            return super().experts(x_TD, expert_ids_TK, weights_TK, gate_up_E2FD, down_EDF)
        T, K = expert_ids_TK.shape
        layout = lay_out_rows(expert_ids_TK, E)
        x_UD = x_TD.new_zeros(layout.rows, D).index_copy(0, layout.row_P, x_TD.index_select(0, layout.order_P // K))
        weights_P = weights_TK.flatten().index_select(0, layout.order_P).to(x_TD.dtype)
        weights_U = x_TD.new_zeros(layout.rows).index_copy(0, layout.row_P, weights_P)
        gate_UF, up_UF = _ExpertProduct.apply(x_UD, gate_up_E2FD, layout).chunk(2, dim=-1)
        y_UD = _ExpertProduct.apply(F.silu(gate_UF) * up_UF * weights_U[:, None], down_EDF, layout)
        row_of_pair_P = torch.empty_like(layout.order_P).scatter_(0, layout.order_P, layout.row_P)
        return y_UD.index_select(0, row_of_pair_P).unflatten(0, (T, K)).sum(dim=1)


@dataclass(frozen=True)
class RowLayout:
    """The row of each pair of token and expert, when each expert's rows begin on a tile of their own."""

    rows: int  # U, enough for any routing of so many pairs
    order_P: Tensor  # pairs sorted by expert
    row_P: Tensor  # the row of each, in that order
    expert_tile: Tensor  # int32 (U / 128): the expert of each tile of rows, -1 for none
    first_tile: Tensor  # int32 (E + 1)


def lay_out_rows(expert_ids_TK: Tensor, num_experts: int) -> RowLayout:
    """Lay out the pairs of (T, K) expert ids; every number stays on the device."""
    ids_P = expert_ids_TK.flatten()
    rows = (ids_P.shape[0] + num_experts * (BLOCK - 1)) // BLOCK * BLOCK
    order_P = ids_P.argsort(stable=True)
    counts_E = count_tokens(expert_ids_TK, num_experts)
    first_tile = F.pad(((counts_E + BLOCK - 1) // BLOCK).cumsum(0), (1, 0))
    shift_E = first_tile[:-1] * BLOCK - (counts_E.cumsum(0) - counts_E)
    row_P = torch.arange(ids_P.shape[0], device=ids_P.device) + shift_E[ids_P[order_P]]
    tile = torch.arange(rows // BLOCK, device=ids_P.device)
    expert_tile = torch.searchsorted(first_tile[1:], tile, right=True)
    expert_tile = torch.where(tile < first_tile[-1], expert_tile, -1)
    return RowLayout(rows, order_P, row_P, expert_tile.to(torch.int32), first_tile.to(torch.int32))


class _HopperProduct(torch.autograd.Function):
    """The three products of one linear layer."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        x = tiles(x_TI)
        ctx.save_for_backward(x.values_MK, x.scale, weight_OI)
        ctx.rows = x_TI.shape[0]
        ctx.dtype = x_TI.dtype
        return product(x, blocks(weight_OI), x_TI.dtype)[: ctx.rows, : weight_OI.shape[0]]

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor]:
        x_values, x_scale, weight_OI = ctx.saved_tensors
        grad_x = product(tiles(grad_TO), blocks(weight_OI, transposed=True), ctx.dtype)
        grad_weight = product(tiles(grad_TO, transposed=True), retiled(Operand(x_values, x_scale)), torch.float32)
        O, I = weight_OI.shape  # noqa: E741
        return grad_x[: ctx.rows, :I], grad_weight[:O, :I].to(weight_OI.dtype)


class _ExpertProduct(torch.autograd.Function):
    """The three products of one stack of expert weights (E, O, I), all experts at once: rows (U, I) to (U, O)."""

    @staticmethod
    def forward(ctx: Any, x_UI: Tensor, weight_EOI: Tensor, layout: RowLayout) -> Tensor:
        from soli.kernels.fp8 import triton_kernels

        x = tiles(x_UI)
        weight = blocks(weight_EOI)
        ctx.save_for_backward(x.values_MK, x.scale, weight_EOI)
        ctx.layout = layout
        ctx.dtype = x_UI.dtype
        return triton_kernels.grouped(
            x.values_MK, x.scale, weight.values_MK, weight.scale, layout.expert_tile, x_UI.dtype
        )

    @staticmethod
    def backward(ctx: Any, grad_UO: Tensor) -> tuple[Tensor, Tensor, None]:
        from soli.kernels.fp8 import triton_kernels

        x_values, x_scale, weight_EOI = ctx.saved_tensors
        grad = tiles(grad_UO)
        weight = blocks(weight_EOI, transposed=True)
        grad_x = triton_kernels.grouped(
            grad.values_MK, grad.scale, weight.values_MK, weight.scale, ctx.layout.expert_tile, ctx.dtype
        )
        x = retiled(Operand(x_values, x_scale))
        grad_OU = tiles(grad_UO, transposed=True)
        grad_weight = triton_kernels.by_expert(
            grad_OU.values_MK, grad_OU.scale, x.values_MK, x.scale, ctx.layout.first_tile, weight_EOI.dtype
        )
        return grad_x, grad_weight, None
