"""Matrices in FP8 as a GPU's products need them: padded to whole tiles, the side that is summed over last.

`torch.nn.functional.scaled_mm` on Hopper (cuBLAS 12.9 and newer) takes A (M, K) by rows and B (K, N) by columns, both
e4m3, and fp32 scales of two kinds:

    BlockWise1x128     one per 128 of K:   A's (M, K/128) with strides (1, M), B's (N, K/128) with strides (1, N)
    BlockWise128x128   one per block:      B's (K/128 padded to 4, N/128) with strides (1, K/128 padded to 4)

An `Operand` holds the values (M, K) and the scales of which those are views. M and K are multiples of 128: padding has
value 0 and changes no sum. Arithmetic is that of `formats.fp8`, to the bit; where Triton is available, one kernel does
it in one pass over a GPU's memory. That kernel rejects nothing: a NaN stays one and spreads.

Legend: M, K sides of an operand, T, I those of its source, S stacked matrices (experts), Q tiles along K.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from soli.formats.fp8 import BLOCK, dequantize_tiles, quantize, quantize_tiles

SCALE_ROW_MULTIPLE = 4  # cuBLAS: the rows of scales of blocks have a multiple of four


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
