"""FP8 training through a GPU's own FP8 products: what `emulation.py` emulates, on Hopper with CUDA 12.9 or newer.

The three products of a linear layer (paper, section 3.3) are one `scaled_mm` each:

    y      = x w^T       x in 1x128 tiles along I,  w in 128x128 blocks
    grad_x = grad_y w    grad_y in 1x128 tiles along O, the same blocks, transposed
    grad_w = grad_y^T x  both in 1x128 tiles along tokens, x requantized from the saved FP8 form

The experts of a layer are one Triton launch per product where all sides are multiples of 128, tokens sorted by expert
and each expert's rows padded to 128, so that no tile spans two; nothing is read back to the host. Else they are one
`scaled_mm` per selected expert. Tensor cores add up to 128 products in less than fp32; sums of those are fp32.

`torch.nn.functional.scaled_mm` on Hopper (cuBLAS 12.9 and newer) takes A (M, K) by rows and B (K, N) by columns, both
e4m3, and fp32 scales of two kinds:

    BlockWise1x128     one per 128 of K:   A's (M, K/128) with strides (1, M), B's (N, K/128) with strides (1, N)
    BlockWise128x128   one per block:      B's (K/128 padded to 4, N/128) with strides (1, K/128 padded to 4)

An `Operand` holds the values (M, K) and the scales of which those are views. M and K are multiples of 128: padding has
value 0 and changes no sum. Arithmetic is that of `formats.fp8`, to the bit; where Triton is available, one kernel does
it in one pass over a GPU's memory. That kernel rejects nothing: a NaN stays one and spreads.

Shapes: T rows (tokens), I input and O output features, K selected, P = T*K pairs, U rows of all experts' tiles; M, K
sides of an operand, Q tiles along K, S stacked matrices (experts).
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from soli.formats.fp8 import BLOCK, dequantize_tiles, quantize, quantize_tiles
from soli.kernels.fp8.emulation import Fp8Emulation
from soli.kernels.torch_backend import count_tokens

SCALE_ROW_MULTIPLE = 4  # cuBLAS: the rows of scales of blocks have a multiple of four


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


@dataclass(frozen=True)
class Operand:
    """Values (M, K), or (S, M, K) of a stack; scales of tiles (Q, M), of blocks (M/128, Q padded to 4) or a stack."""

    values_MK: Tensor
    scale: Tensor
    blocks: bool = False


def tiles(x_TI: Tensor, transposed: bool = False) -> Operand:
    """1x128 tiles along I, (M, K) = (T, I); transposed: along T, (M, K) = (I, T)."""
    if _on_gpu(x_TI):
        from soli.kernels.fp8 import triton_kernels

        return Operand(*triton_kernels.quantize(x_TI.contiguous(), "columns" if transposed else "rows", transposed))
    values_MK, scale_MQ = quantize_tiles(pad_to_blocks(x_TI.t() if transposed else x_TI))
    return Operand(values_MK, scale_MQ.t().contiguous())


def retiled(operand: Operand) -> Operand:
    """Tiles along the other side, (M, K) to (K, M), of the values and scales of the first ones."""
    if _on_gpu(operand.values_MK):
        from soli.kernels.fp8 import triton_kernels

        return Operand(*triton_kernels.quantize(operand.values_MK, "columns", True, operand.scale))
    return tiles(dequantize_tiles(operand.values_MK, operand.scale.t()), transposed=True)


def blocks(weight: Tensor, transposed: bool = False) -> Operand:
    """128x128 blocks of a matrix (T, I) or a stack (S, T, I); transposed: the same blocks of the transpose."""
    if _on_gpu(weight):
        from soli.kernels.fp8 import triton_kernels

        return Operand(*triton_kernels.quantize(weight.contiguous(), "blocks", transposed), blocks=True)
    stack = weight if weight.dim() == 3 else weight[None]
    quantized = [quantize(pad_to_blocks(matrix.t() if transposed else matrix)) for matrix in stack]
    values = torch.stack([values_MK for values_MK, _ in quantized])
    scale = torch.stack([F.pad(scale, (0, -scale.shape[1] % SCALE_ROW_MULTIPLE)) for _, scale in quantized])
    return Operand(values, scale, blocks=True) if weight.dim() == 3 else Operand(values[0], scale[0], blocks=True)


def product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """A B^T, (M, N), of two operands with one K; A in tiles, B in tiles or blocks. CUDA with capability 9 alone."""
    return F.scaled_mm(
        a.values_MK,
        b.values_MK.t(),
        a.scale.t(),
        F.ScalingType.BlockWise1x128,
        b.scale.t(),
        F.ScalingType.BlockWise128x128 if b.blocks else F.ScalingType.BlockWise1x128,
        output_dtype=dtype,
    )


def pad_to_blocks(matrix: Tensor) -> Tensor:
    """Zeros after the last rows and columns, up to multiples of 128."""
    rows, columns = matrix.shape
    return F.pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))


def has_triton() -> bool:
    """Whether Triton can be imported here."""
    return find_spec("triton") is not None


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and has_triton()
