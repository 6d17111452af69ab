"""A weight in any storage format, as it lies in a file or in memory: what both seams take beside plain tensors.

Shapes: ... leading dimensions (experts), O output features, I input features, g group.

    fp32, bf16   weight (..., O, I), no scale
    fp8          weight float8_e4m3fn (..., O, I), scale fp32 (..., ceil(O/128), ceil(I/128)): code * scale
    int8         weight int8 (..., O, I), scale float16 (..., O, I/g): code * scale
    int4         weight uint8 (..., O, I/2), scale float16 (..., O, I/g): (nibble - 8) * scale; of each 32 neighbours
                 along I, byte j of 16 holds number j in its low half and number j + 16 in its high half

Nothing is rearranged on loading: kernels read exactly these bytes. Refused, when the value is made: tensors whose
dtype, shape or layout is not the format's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soli.errors import SoliError
from soli.formats.fp8 import BLOCK

RUN = 32  # neighbours along I that share 16 bytes in int4
GROUPS = (32, 64, 128)  # group sizes of int8 and int4
WEIGHT_DTYPE = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
}
SCALE_DTYPE = {"fp8": torch.float32, "int8": torch.float16, "int4": torch.float16}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One matrix or a stack of them: `format` is a key of WEIGHT_DTYPE, `shape` that of the weight written out,
    `group` the inputs that share a scale (128 for fp8, 0 for fp32 and bf16). SoliError when the tensors do not fit."""

    format: str
    weight: Tensor
    scale: Tensor | None
    shape: tuple[int, ...]
    group: int

    def __post_init__(self) -> None:
        if self.format not in WEIGHT_DTYPE:
            raise SoliError(f"weight format is {self.format!r}: choose one of {', '.join(WEIGHT_DTYPE)}")
        if len(self.shape) < 2:
            raise SoliError(f"a packed weight is a matrix or a stack of them, but this shape is {tuple(self.shape)}")
        self._check_group()
        *leading, O, I = self.shape  # noqa: E741
        codes = (*leading, O, I // 2 if self.format == "int4" else I)
        self._check("weight", self.weight, codes, WEIGHT_DTYPE[self.format])
        if self.format not in SCALE_DTYPE:
            if self.scale is not None:
                raise SoliError(f"a {self.format} weight has no scale, but one was given")
            return
        rows = -(-O // BLOCK) if self.format == "fp8" else O
        self._check("scale", self.scale, (*leading, rows, -(-I // self.group)), SCALE_DTYPE[self.format])

    def _check_group(self) -> None:
        wanted: tuple[int, ...] = (0,)
        if self.format in SCALE_DTYPE:
            wanted = (BLOCK,) if self.format == "fp8" else GROUPS
        if self.group not in wanted:
            raise SoliError(f"{self.format} weights have groups of {' or '.join(map(str, wanted))}, not {self.group}")
        if self.format in ("int8", "int4") and self.shape[-1] % self.group:
            raise SoliError(f"{self.shape[-1]} input features are no multiple of the group of {self.group}")

    def _check(self, name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if tensor is None:
            raise SoliError(f"a {self.format} weight needs its scale")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            layout = "" if tensor.is_contiguous() else " and not contiguous"
            raise SoliError(
                f"the {name} of a {self.format} weight of shape {tuple(self.shape)} must be {dtype} {shape}, "
                f"but it is {tensor.dtype} {tuple(tensor.shape)}{layout}"
            )

    def __getitem__(self, index: int) -> QuantizedWeight:
        """One of a stack, without a copy."""
        scale = None if self.scale is None else self.scale[index]
        return QuantizedWeight(self.format, self.weight[index], scale, tuple(self.shape[1:]), self.group)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on `device`; itself where it is there already."""
        if self.weight.device == torch.device(device):
            return self
        scale = None if self.scale is None else self.scale.to(device)
        return QuantizedWeight(self.format, self.weight.to(device), scale, self.shape, self.group)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: what one product reads."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight written out, (..., O, I): code times scale in fp32, then one rounding to `dtype`."""
        if self.scale is None:
            return self.weight.to(dtype)
        if self.format == "fp8":
            scale = self.scale.repeat_interleave(BLOCK, -2)[..., : self.shape[-2], :]
            scale = scale.repeat_interleave(BLOCK, -1)[..., : self.shape[-1]]
            return (self.weight.float() * scale).to(dtype)
        codes = self.weight.float() if self.format == "int8" else _nibbles(self.weight)
        values = codes.unflatten(-1, (-1, self.group)) * self.scale.float()[..., None]
        return values.flatten(-2).to(dtype)


def plain(weight: Tensor) -> QuantizedWeight:
    """A contiguous float32 or bfloat16 tensor (..., O, I) as a QuantizedWeight, without a copy."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    if weight.dtype not in names:
        raise SoliError(f"a plain weight is float32 or bfloat16, not {weight.dtype}")
    return QuantizedWeight(names[weight.dtype], weight, None, tuple(weight.shape), 0)


def _nibbles(weight: Tensor) -> Tensor:
    """int4 bytes (..., I/2) to their values -8..7 in fp32 (..., I), before the scale."""
    runs = weight.unflatten(-1, (-1, RUN // 2))
    return (torch.cat((runs & 15, runs >> 4), dim=-1).flatten(-2).to(torch.int8) - 8).float()
