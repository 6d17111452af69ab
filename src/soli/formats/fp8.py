"""The arithmetic of FP8 weights as in the official DeepSeek-V3 files: E4M3 values, a scale per 128x128 block.

    scale = amax(block) / 448        value = e4m3(block / scale)        weight = value * scale

A matrix whose sides are no multiples of 128 is padded with zeros to whole blocks and cropped again. `ue8m0` rounds
every scale up to a power of two, as in DeepSeek-V3.1. Scales and arithmetic are fp32; the cast to E4M3 rounds to
nearest even.

Error, for a weight w in a block of scale s: |w - dequantize(quantize(w))| <= max(2^-4 |w|, 2^-10 s), within fp32
rounding. Rejected: NaN, infinity, and magnitudes above 2^127, which rounding could carry past the end of fp32.

Activations and gradients in FP8 training (paper, section 3.3) have one scale per 1x128 tile of a row instead: the same
arithmetic and the same error, but nothing is rejected: a NaN or an infinity makes its whole tile NaN.

Legend: O output features, I input features, P and Q blocks along O and I, b the block's side, T tokens.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from soli.errors import SoliError

BLOCK: Final = 128
E4M3: Final = torch.float8_e4m3fn
E4M3_MAX: Final = 448.0  # the largest E4M3 number; the format has no infinity
SCALE_MIN: Final = 2.0**-126  # smallest normal fp32: a block of denormals must not divide by an underflowed scale, 0
WEIGHT_MAX: Final = 2.0**127


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of a `rows x columns` weight."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantize(weight_OI: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Values (O, I) and scales (P, Q) of a matrix of any floating dtype; a block of zeros gets scale 1.

    Raises SoliError for a tensor that is not a matrix, and for values that E4M3 blocks cannot hold.
    """
    if weight_OI.dim() != 2:
        raise SoliError(f"FP8 blocks need a matrix, but this weight has shape {tuple(weight_OI.shape)}")
    if weight_OI.numel() == 0:
        scale_PQ = weight_OI.new_ones(scale_shape(*weight_OI.shape), dtype=torch.float32)
        return weight_OI.to(E4M3), scale_PQ
    blocks_PbQb = _blocks(weight_OI.float())
    amax_PQ = blocks_PbQb.abs().amax(dim=(1, 3))
    if not bool((amax_PQ <= WEIGHT_MAX).all()):  # written so that NaN fails too
        raise SoliError("FP8 cannot hold this weight: it has NaN, infinite or larger values than 2^127")
    scale_PQ = _scale(amax_PQ, ue8m0)
    values_PbQb = (blocks_PbQb / scale_PQ[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return _crop(values_PbQb, weight_OI.shape), scale_PQ


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight, or a stack of them, (..., O, I): each block times its scale (..., P, Q) in fp32, then one rounding."""
    if values.numel() == 0:
        return values.to(dtype)
    blocks = _blocks(values.float()).mul_(scale.float()[..., :, None, :, None])
    return _crop(blocks.to(dtype), values.shape)


def check_scale(scale: Tensor) -> None:
    """Raise SoliError when a scale is not finite and positive, or so large that its largest weight is not finite."""
    if not bool(((scale > 0) & (scale * E4M3_MAX).isfinite()).all()):
        raise SoliError("an FP8 scale is not a finite positive number, or so large that weights are not finite")


def quantize_tiles(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the rows of a matrix of any floating dtype, 128 neighbours at a time; a tile of zeros gets scale 1.

    Values (T, I) and fp32 scales (T, Q) with Q = ceil(I/128); the last tile may be short.
    """
    tiles_TQb = _tiles(x_TI.float())
    scale_TQ = _scale(tiles_TQb.abs().amax(dim=-1), ue8m0=False)
    values_TQb = (tiles_TQb / scale_TQ[..., None]).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return values_TQb.flatten(1)[:, : x_TI.shape[1]].contiguous(), scale_TQ


def dequantize_tiles(values_TI: Tensor, scale_TQ: Tensor) -> Tensor:
    """Dequantize to fp32 (T, I): each tile times its scale."""
    rows_TQb = _tiles(values_TI.float()) * scale_TQ[..., None]
    return rows_TQb.flatten(1)[:, : values_TI.shape[1]]


def is_ue8m0(scale_PQ: Tensor) -> bool:
    """Whether every scale is a power of two."""
    mantissa_PQ, _ = torch.frexp(scale_PQ.float())
    return bool((mantissa_PQ == 0.5).all())


def _scale(amax_PQ: Tensor, ue8m0: bool) -> Tensor:
    scale_PQ = (amax_PQ / E4M3_MAX).clamp_min_(SCALE_MIN)
    if ue8m0:
        mantissa_PQ, exponent_PQ = torch.frexp(scale_PQ)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        exponent_PQ = exponent_PQ - (mantissa_PQ == 0.5).to(exponent_PQ.dtype)
        scale_PQ = torch.ldexp(torch.ones_like(scale_PQ), exponent_PQ)
    return torch.where(amax_PQ == 0, torch.ones_like(scale_PQ), scale_PQ)


def _tiles(x_TI: Tensor) -> Tensor:
    """View rows as tiles (T, Q, b), padded with zeros where they are ragged; rows below 128 are one short tile."""
    width = x_TI.shape[1]
    side = max(1, min(BLOCK, width))
    if width % side:
        x_TI = pad(x_TI, (0, -width % side))
    return x_TI.unflatten(1, (-1 if width else 0, side))


def _blocks(weight: Tensor) -> Tensor:
    """View a weight (..., O, I) as whole blocks (..., P, b, Q, b), padded with zeros where it is ragged."""
    *leading, rows, columns = weight.shape
    if rows % BLOCK or columns % BLOCK:
        weight = pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    p, q = scale_shape(rows, columns)
    return weight.reshape(*leading, p, BLOCK, q, BLOCK)


def _crop(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Blocks (..., P, b, Q, b) as a weight of this shape (..., O, I)."""
    return blocks.flatten(-4, -3).flatten(-2)[..., : shape[-2], : shape[-1]].contiguous()
