"""The arithmetic of four-bit floats: E2M1 values, two to a byte, with one scale for a group of neighbours.

    E2M1   sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6     low half of a byte first

NVFP4 has an E4M3 scale for 16 neighbours and one fp32 scale for the tensor; MXFP4 a power of two for 32 (E8M0: a byte
e for 2^(e - 127), OCP Microscaling Formats 1.0, section 5.4). Here both are one fp32 scale per group, in which an E4M3
times an fp32 is rounded once, as in the published code.

Shapes: ... leading dimensions, O output and I input features, G groups along I.
"""

from typing import Final

import torch
from torch import Tensor

GROUPS: Final = (16, 32)
MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1: Final = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])  # by nibble
BYTES: Final = torch.stack((E2M1.repeat(16), E2M1.repeat_interleave(16)), dim=1)  # both numbers, by byte


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight (..., O, I) from bytes (..., O, I/2) and fp32 scales (..., O, G): the product in fp32, then rounded."""
    numbers = BYTES.to(values.device)[values.int()].flatten(-2)
    group = numbers.shape[-1] // scale.shape[-1]
    return numbers.unflatten(-1, (-1, group)).mul_(scale[..., None]).flatten(-2).to(dtype)
