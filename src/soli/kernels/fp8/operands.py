"""Matrices in FP8 as a GPU's products want them: filled up to whole tiles, the side that is summed over last.

`torch.nn.functional.scaled_mm` on Hopper (cuBLAS 12.9 and newer) takes A (M, K) by rows and B (K, N) by columns, both
e4m3, and fp32 scales of two kinds:

    BlockWise1x128     one per 128 of K:   A's (M, K/128) with strides (1, M), B's (N, K/128) with strides (1, N)
    BlockWise128x128   one per block:      B's (K/128 filled up to 4, N/128) with strides (1, K/128 filled up to 4)

An `Operand` holds the codes (M, K) and the scales of which those are views. M and K are multiples of 128: what was
filled up has codes 0 and changes no sum. Arithmetic is that of `formats.fp8`, to the bit; where Triton is at hand, one
kernel does it in one pass over a GPU's memory. That kernel refuses nothing: a NaN stays one and spreads.

Legend: M, K sides of an operand, T, I those of what it is made from, S stacked matrices (experts), Q tiles along K.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from soli.formats.fp8 import BLOCK, Tiles, pack, pack_tiles, unpack_tiles

L_MULTIPLE = 4  # cuBLAS: scales of blocks lie in rows of a multiple of four


@dataclass(frozen=True)
class Operand:
    """Codes (M, K), or (S, M, K) of a stack; scales of tiles (Q, M), of blocks (M/128, Q filled up to 4) or a stack."""

    codes_MK: Tensor
    scale: Tensor
    blocks: bool = False


def tiles(x_TI: Tensor, turned: bool = False) -> Operand:
    """1x128 tiles along I, (M, K) = (T, I); turned: along T, (M, K) = (I, T)."""
    if _on_gpu(x_TI):
        from soli.kernels.fp8.triton_kernels import quantise

        return Operand(*quantise(x_TI.contiguous(), "columns" if turned else "rows", turned))
    quantized = pack_tiles(filled(x_TI.t() if turned else x_TI))
    return Operand(quantized.codes_TI, quantized.scale_TQ.t().contiguous())


def retiled(operand: Operand) -> Operand:
    """Tiles along the other side, (M, K) to (K, M), from what the first ones kept."""
    if _on_gpu(operand.codes_MK):
        from soli.kernels.fp8.triton_kernels import quantise

        return Operand(*quantise(operand.codes_MK, "columns", True, operand.scale))
    return tiles(unpack_tiles(Tiles(operand.codes_MK, operand.scale.t())), turned=True)


def blocks(weight: Tensor, turned: bool = False) -> Operand:
    """128x128 blocks of a matrix (T, I) or a stack (S, T, I); turned: the same blocks of the transpose."""
    if _on_gpu(weight):
        from soli.kernels.fp8.triton_kernels import quantise

        return Operand(*quantise(weight.contiguous(), "blocks", turned), blocks=True)
    stack = weight if weight.dim() == 3 else weight[None]
    quantized = [pack(filled(matrix.t() if turned else matrix)) for matrix in stack]
    codes = torch.stack([one.codes_OI for one in quantized])
    scale = torch.stack([F.pad(one.scale_PQ, (0, -one.scale_PQ.shape[1] % L_MULTIPLE)) for one in quantized])
    return Operand(codes, scale, blocks=True) if weight.dim() == 3 else Operand(codes[0], scale[0], blocks=True)


def product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """A B^T, (M, N), of two operands with one K; A in tiles, B in tiles or blocks. CUDA with capability 9 alone."""
    return F.scaled_mm(
        a.codes_MK,
        b.codes_MK.t(),
        a.scale.t(),
        F.ScalingType.BlockWise1x128,
        b.scale.t(),
        F.ScalingType.BlockWise128x128 if b.blocks else F.ScalingType.BlockWise1x128,
        output_dtype=dtype,
    )


def filled(matrix: Tensor) -> Tensor:
    """Zeros after the last rows and columns, up to multiples of 128."""
    rows, columns = matrix.shape
    return F.pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))


def has_triton() -> bool:
    """Whether Triton can be imported here."""
    return find_spec("triton") is not None


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and has_triton()
