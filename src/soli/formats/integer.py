"""The arithmetic of integer weights: 8 or 4 bits with one float16 scale for each group of neighbours along the input.

    int8   weight = value * scale, value -127..127     scale = amax(group) / 127, rounded up: no value is clipped
    int4   weight = value * scale, value -8..7         scale of either sign, searched for

What is stored for int4 is value + 8, two to a byte: of 32 neighbours, byte j of 16 holds number j in its low half and
number j + 16 in its high half.

The int4 search tries scales that put the group's largest number m, with its sign, at -7, -7.5, -8, -8.5 and -9, then
the least-squares scale of the best one's values, and keeps what has the smallest squared error: rms 8.1 % of a normally
distributed weight against 9.7 % for amax / 7 and 8.7 % for m / -8 alone (groups of 32); trying 64 scales gains another
0.05 %. Arithmetic is fp32 with the scale as it is stored.

Error of a weight in a group of scale s and largest magnitude a: int8 at most s / 2, where s <= 1.001 a / 127 + 2^-24;
int4 in the root mean square over the group at most a / 8 + 2^-21. Rejected: tensors that are no matrix, inputs that are
no multiple of the group, NaN, infinity, and values past 65504 * 6, where float16 scales end.

Shapes: O output features, I input features, G groups along I, g group, N groups of a chunk.
"""

from typing import Final

import torch
from torch import Tensor

from soli.errors import SoliError

GROUPS: Final = (32, 64, 128)
RUN: Final = 32  # neighbours that share 16 bytes in int4
WEIGHT_MAX: Final = 65504.0 * 6
SMALLEST: Final = 2.0**-24  # float16's smallest number: the scale of groups that are all zero, or nearly
CANDIDATES: Final = (-7.0, -7.5, -8.0, -8.5, -9.0)  # where the search puts a group's largest number
CHUNK: Final = 8192  # groups quantized at a time: fp32 copies stay small, and in a core's cache


def quantize(weight_OI: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Values, int8 (O, I) or uint8 (O, I/2), and float16 scales (O, G) of a matrix of any floating dtype.

    Raises SoliError for what the module's text rejects.
    """
    if weight_OI.dim() != 2:
        raise SoliError(f"int{bits} needs a matrix, but this weight has shape {tuple(weight_OI.shape)}")
    rows, columns = weight_OI.shape
    if group not in GROUPS or columns % group:
        raise SoliError(f"int{bits} needs inputs in groups of 32, 64 or 128, but {columns} are no multiple of {group}")
    if not bool((weight_OI.abs() <= WEIGHT_MAX).all()):  # written so that NaN fails too
        raise SoliError(f"int{bits} cannot hold this weight: it has NaN, infinite or larger values than {WEIGHT_MAX:g}")
    values: list[Tensor] = []
    scales: list[Tensor] = []
    for groups_Ng in weight_OI.reshape(-1, group).split(CHUNK):
        groups_Ng = groups_Ng.float()
        scale_N1 = _scale8(groups_Ng) if bits == 8 else _scale4(groups_Ng)
        values.append(_values(groups_Ng, scale_N1, bits).to(torch.int8))
        scales.append(scale_N1.half())
    values_OI = torch.cat(values).reshape(rows, columns)
    scale_OG = torch.cat(scales).reshape(rows, columns // group)
    return values_OI if bits == 8 else _pack_nibbles(values_OI), scale_OG


def dequantize(values: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """A weight, or a stack of them, (..., O, I): each group times its scale (..., O, G) in fp32, then one rounding."""
    numbers = values.float() if bits == 8 else _unpack_nibbles(values)
    group = numbers.shape[-1] // scale.shape[-1]
    return (numbers.unflatten(-1, (-1, group)) * scale.float()[..., None]).flatten(-2).to(dtype)


def from_neighbour_pairs(values: Tensor) -> Tensor:
    """Bytes (..., I/2) of number 2 j in the low and 2 j + 1 in the high half, each + 8, in the order of int4."""
    runs = values.unflatten(-1, (-1, RUN // 2))
    halves = torch.stack((runs & 15, runs >> 4), dim=-1).flatten(-2).unflatten(-1, (2, RUN // 2))
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)


def _values(groups_Ng: Tensor, scale_N1: Tensor, bits: int) -> Tensor:
    lowest, highest = (-127, 127) if bits == 8 else (-8, 7)
    return (groups_Ng / scale_N1).round_().clamp_(lowest, highest)


def _scale8(groups_Ng: Tensor) -> Tensor:
    exact_N1 = groups_Ng.abs().amax(dim=1, keepdim=True) / 127
    scale_N1 = exact_N1.half()
    low_N1 = (scale_N1.float() < exact_N1).to(torch.int16)
    return (scale_N1.view(torch.int16) + low_N1).view(torch.float16).float().clamp_min_(SMALLEST)


def _scale4(groups_Ng: Tensor) -> Tensor:
    """The scale with the smallest squared error among those of `CANDIDATES` and the best one's least-squares scale."""
    largest_N1 = groups_Ng.gather(1, groups_Ng.abs().argmax(dim=1, keepdim=True))
    best_N1 = torch.full_like(largest_N1, SMALLEST)
    error_N1 = torch.full_like(largest_N1, torch.inf)

    def consider(scale_N1: Tensor) -> None:
        nonlocal best_N1, error_N1
        scale_N1 = scale_N1.half().float()
        scale_N1 = torch.where(scale_N1 == 0, SMALLEST, scale_N1)
        squared_N1 = (_values(groups_Ng, scale_N1, 4) * scale_N1).sub_(groups_Ng).square_().sum(dim=1, keepdim=True)
        better_N1 = squared_N1 < error_N1
        best_N1 = torch.where(better_N1, scale_N1, best_N1)
        error_N1 = torch.where(better_N1, squared_N1, error_N1)

    for candidate in CANDIDATES:
        consider(largest_N1 / candidate)
    values_Ng = _values(groups_Ng, best_N1, 4)
    length_N1 = values_Ng.square().sum(dim=1, keepdim=True).clamp_min_(1)
    consider((values_Ng * groups_Ng).sum(dim=1, keepdim=True) / length_N1)
    return best_N1


def _pack_nibbles(values_OI: Tensor) -> Tensor:
    """Values -8..7 (O, I) as bytes (O, I/2)."""
    halves = (values_OI + 8).to(torch.uint8).unflatten(1, (-1, 2, RUN // 2))
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def _unpack_nibbles(values: Tensor) -> Tensor:
    """Bytes (..., I/2) as values -8..7 in fp32 (..., I), before the scale."""
    runs = values.unflatten(-1, (-1, RUN // 2))
    return (torch.cat((runs & 15, runs >> 4), dim=-1).flatten(-2).to(torch.int8) - 8).float()
