"""FP8 weights as in the official DeepSeek-V3 files: E4M3 codes and one fp32 scale per 128x128 block.

    scale = amax(block) / 448        code = e4m3(block / scale)        weight = code * scale

A matrix whose sides are no multiples of 128 is padded with zeros to whole blocks and cut again. `ue8m0` rounds every
scale up to a power of two, as in DeepSeek-V3.1. Arithmetic is fp32; the cast to E4M3 rounds to nearest even.

Error, for a weight w in a block of scale s: |w - unpack(pack(w))| <= max(2^-4 |w|, 2^-10 s), within fp32 rounding.
Refused: NaN, infinity, and magnitudes above 2^127, which rounding could carry past the end of fp32.

Activations and gradients in FP8 training (paper, section 3.3) have one scale per 1x128 tile of a row instead: the same
arithmetic and the same error, but nothing is refused: a NaN or an infinity makes its whole tile NaN.

Legend: O output features, I input features, P and Q blocks along O and I, b the block's side, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from soli.errors import SoliError

BLOCK = 128
CODE_DTYPE = torch.float8_e4m3fn
CODE_MAX = 448.0  # the largest E4M3 number; the format has no infinity
SCALE_MIN = 2.0**-126  # smallest normal fp32: a block of denormals must not divide by a scale that underflowed to 0
WEIGHT_MAX = 2.0**127


@dataclass(frozen=True)
class Packed:
    """One matrix in FP8: `codes_OI` float8_e4m3fn, `scale_PQ` fp32 with P = ceil(O/128), Q = ceil(I/128)."""

    codes_OI: Tensor
    scale_PQ: Tensor


@dataclass(frozen=True)
class Tiles:
    """Rows in FP8: `codes_TI` float8_e4m3fn, `scale_TQ` fp32 with Q = ceil(I/128); the last tile may be short."""

    codes_TI: Tensor
    scale_TQ: Tensor


@dataclass(frozen=True)
class PackError:
    """What packing lost: the largest absolute error, and the root mean square error over that of the weight."""

    max_abs: float
    relative_rms: float


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of a `rows x columns` weight."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def pack(weight_OI: Tensor, ue8m0: bool = False) -> Packed:
    """Quantise a matrix of any floating dtype; a block of zeros gets scale 1.

    Raises SoliError for a tensor that is not a matrix, and for values that E4M3 blocks cannot hold.
    """
    if weight_OI.dim() != 2:
        raise SoliError(f"FP8 blocks need a matrix, but this weight has shape {tuple(weight_OI.shape)}")
    if weight_OI.numel() == 0:
        scale_PQ = weight_OI.new_ones(scale_shape(*weight_OI.shape), dtype=torch.float32)
        return Packed(weight_OI.to(CODE_DTYPE), scale_PQ)
    blocks_PbQb = _blocks(weight_OI.float())
    amax_PQ = blocks_PbQb.abs().amax(dim=(1, 3))
    if not bool((amax_PQ <= WEIGHT_MAX).all()):  # written so that NaN fails too
        raise SoliError("FP8 cannot hold this weight: it has NaN, infinite or larger values than 2^127")
    scale_PQ = _scale(amax_PQ, ue8m0)
    codes_PbQb = (blocks_PbQb / scale_PQ[:, None, :, None]).clamp_(-CODE_MAX, CODE_MAX).to(CODE_DTYPE)
    return Packed(_cut(codes_PbQb, weight_OI.shape), scale_PQ)


def unpack(packed: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Dequantise to `dtype` (O, I): each block times its scale in fp32, then one rounding. Raises as `check` does."""
    check(packed)
    codes_OI, scale_PQ = packed.codes_OI, packed.scale_PQ.float()
    if codes_OI.numel() == 0:
        return codes_OI.to(dtype)
    blocks_PbQb = _blocks(codes_OI.float()).mul_(scale_PQ[:, None, :, None])
    return _cut(blocks_PbQb.to(dtype), codes_OI.shape)


def check(packed: Packed) -> None:
    """Raise SoliError when the scales do not fit the codes, or are not finite and positive."""
    scale_PQ, expected = packed.scale_PQ.float(), scale_shape(*packed.codes_OI.shape)
    if tuple(scale_PQ.shape) != expected:
        raise SoliError(
            f"scales of shape {tuple(scale_PQ.shape)} do not fit a weight of shape {tuple(packed.codes_OI.shape)}: "
            f"one is needed for each {BLOCK}x{BLOCK} block, {expected}"
        )
    if not bool(((scale_PQ > 0) & scale_PQ.isfinite()).all()):
        raise SoliError("an FP8 scale is not a finite positive number")


def error(weight_OI: Tensor, packed: Packed) -> PackError:
    """Compare a weight with what its packed form unpacks to, in fp32."""
    difference_OI = unpack(packed, torch.float32) - weight_OI.float()
    norm = float(vector_norm(weight_OI, dtype=torch.float64))
    lost = float(vector_norm(difference_OI, dtype=torch.float64))
    return PackError(float(difference_OI.abs().max()), lost / norm if norm else 0.0)


def pack_tiles(x_TI: Tensor) -> Tiles:
    """Quantise the rows of a matrix of any floating dtype, 128 neighbours at a time; a tile of zeros gets scale 1."""
    tiles_TQb = _tiles(x_TI.float())
    scale_TQ = _scale(tiles_TQb.abs().amax(dim=-1), ue8m0=False)
    codes_TQb = (tiles_TQb / scale_TQ[..., None]).clamp_(-CODE_MAX, CODE_MAX).to(CODE_DTYPE)
    return Tiles(codes_TQb.flatten(1)[:, : x_TI.shape[1]].contiguous(), scale_TQ)


def unpack_tiles(tiles: Tiles) -> Tensor:
    """Dequantise to fp32 (T, I): each tile times its scale."""
    rows_TQb = _tiles(tiles.codes_TI.float()) * tiles.scale_TQ[..., None]
    return rows_TQb.flatten(1)[:, : tiles.codes_TI.shape[1]]


def is_ue8m0(scale_PQ: Tensor) -> bool:
    """Whether every scale is a power of two."""
    mantissa_PQ, _ = torch.frexp(scale_PQ.float())
    return bool((mantissa_PQ == 0.5).all())


def _scale(amax_PQ: Tensor, ue8m0: bool) -> Tensor:
    scale_PQ = (amax_PQ / CODE_MAX).clamp_min_(SCALE_MIN)
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


def _blocks(matrix_OI: Tensor) -> Tensor:
    """View a matrix as whole blocks (P, b, Q, b), padded with zeros where it is ragged."""
    rows, columns = matrix_OI.shape
    if rows % BLOCK or columns % BLOCK:
        matrix_OI = pad(matrix_OI, (0, -columns % BLOCK, 0, -rows % BLOCK))
    p, q = scale_shape(rows, columns)
    return matrix_OI.reshape(p, BLOCK, q, BLOCK)


def _cut(blocks_PbQb: Tensor, shape: torch.Size) -> Tensor:
    p, b, q, _ = blocks_PbQb.shape
    return blocks_PbQb.reshape(p * b, q * b)[: shape[0], : shape[1]].contiguous()
