"""A weight in any storage format, in place in a file or in memory: one class, and one codec per format.

Shapes: ... leading dimensions (experts), O output features, I input features, g group.

    fp32, bf16   values (..., O, I), no scale
    fp8          values float8_e4m3fn (..., O, I), scale fp32 (..., ceil(O/128), ceil(I/128)): value * scale
    int8         values int8 (..., O, I), scale float16 (..., O, I/g): value * scale
    int4         values uint8 (..., O, I/2), scale float16 (..., O, I/g): (nibble - 8) * scale; of each 32 neighbours
                 along I, byte j of 16 holds number j in its low half and number j + 16 in its high half

Of other programs' files, only read and not written:

    int4_bf16    as int4, with bfloat16 scales, whose range float16 does not have
    fp8_row      values float8_e4m3fn (..., O, I), scale fp32 (..., O): value * scale
    fp4          values uint8 (..., O, I/2), scale fp32 (..., O, I/g): E2M1, the low half of a byte first (fp4.py)

Nothing is rearranged on loading: kernels read exactly these bytes. Rejected, when the object is made: tensors whose
dtype, shape or layout is not the format's.

To add a format, write its arithmetic in a file beside fp8.py and its codec here, in CODECS; kernels/cpu/native.py
numbers the formats that the C++ kernels read, and plain torch computes the others.
"""

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from soli.errors import SoliError
from soli.formats import fp4, fp8, integer


class SharedScale(SoliError):
    """A part of a weight that begins or ends within values that share a scale."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One matrix or a stack of them: `format` is a key of CODECS, `shape` that of the dequantized weight, `group` the
    inputs that share a scale (128 for fp8, 0 for fp32 and bf16). SoliError when the tensors do not fit."""

    format: str
    values: Tensor
    scale: Tensor | None
    shape: tuple[int, ...]
    group: int

    def __post_init__(self) -> None:
        if self.format not in CODECS:
            raise SoliError(f"weight format is {self.format!r}: choose one of {', '.join(CODECS)}")
        if len(self.shape) < 2:
            raise SoliError(f"a quantized weight is a matrix or a stack of them, but this shape is {tuple(self.shape)}")
        codec = CODECS[self.format]
        codec.check_group(self.shape[-1], self.group)
        self._check("weight", self.values, codec.values_shape(self.shape), codec.values_dtype)
        if codec.scale_dtype is not None:
            self._check("scale", self.scale, codec.scale_shape(self.shape, self.group), codec.scale_dtype)
        elif self.scale is not None:
            raise SoliError(f"a {self.format} weight has no scale, but one was given")

    def _check(self, name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if tensor is None:
            raise SoliError(f"a {self.format} weight needs its scale")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            layout = "" if tensor.is_contiguous() else " and not contiguous"
            raise SoliError(
                f"the {name} of a {self.format} weight of shape {tuple(self.shape)} must be {dtype} {shape}, "
                f"but it is {tensor.dtype} {tuple(tensor.shape)}{layout}"
            )

    def __getitem__(self, index: int) -> "QuantizedWeight":
        """One of a stack, without a copy."""
        scale = None if self.scale is None else self.scale[index]
        return QuantizedWeight(self.format, self.values[index], scale, tuple(self.shape[1:]), self.group)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same on `device`; itself where it is there already."""
        if self.values.device == torch.device(device):
            return self
        scale = None if self.scale is None else self.scale.to(device)
        return QuantizedWeight(self.format, self.values.to(device), scale, self.shape, self.group)

    def part(self, dimension: int, start: int, stop: int) -> "QuantizedWeight":
        """Rows (`dimension` 0) or columns (1) `start` to `stop` - 1 of a matrix, copied. SharedScale where they begin
        or end within values that share a scale."""
        size, codec = self.shape[dimension], CODECS[self.format]
        unit = codec.scale_unit(self.group)[dimension]
        if codec.divides_a_scale(self.group, dimension, range(start, stop), size):
            name = ("rows", "columns")[dimension]
            raise SharedScale(
                f"{name} {start} to {stop - 1} of {size} are no whole number of {self.format} blocks of {unit}"
            )
        shape = (stop - start, self.shape[1]) if dimension == 0 else (self.shape[0], stop - start)
        scale = self.scale
        if scale is not None and dimension < scale.dim():
            first, last = start // unit, -(-stop // unit)
            scale = scale.narrow(dimension, first, last - first).clone(memory_format=torch.contiguous_format)
        per_value = self.values.shape[dimension] / size  # less than 1 where several values share a byte
        first, last = int(start * per_value), int(stop * per_value)
        values = self.values.narrow(dimension, first, last - first).clone(memory_format=torch.contiguous_format)
        return QuantizedWeight(self.format, values, scale, shape, self.group)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales: what one product reads."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight (..., O, I): value times scale in fp32, then one rounding to `dtype`."""
        return CODECS[self.format].dequantize(self.values, self.scale, dtype)


@dataclass(frozen=True)
class Codec:
    """One format: the dtypes and shapes that it stores, and how to quantize and dequantize. `groups` are the numbers
    of inputs that can share a scale, the default first.

    This class is fp32 and bf16, which are casts; the formats with scales derive from it. `is_written`: `quantize` makes
    it and files of Soli may have it.
    """

    name: str
    values_dtype: torch.dtype
    scale_dtype: torch.dtype | None
    groups: tuple[int, ...]
    is_written: bool = field(default=True, kw_only=True)

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored values of a weight (..., O, I)."""
        return tuple(shape)

    def scale_shape(self, shape: tuple[int, ...], group: int) -> tuple[int, ...]:
        """Shape of the scales of a weight (..., O, I)."""
        return ()

    def scale_unit(self, group: int) -> tuple[int, int]:
        """How many rows, and how many columns, share a scale in groups of `group`; 1 where a cut is free."""
        return 1, max(1, group)

    def divides_a_scale(self, group: int, dimension: int, part: range, size: int) -> bool:
        """Whether a part of `size` rows (`dimension` 0) or columns (1) begins or ends within values that share a
        scale."""
        unit = self.scale_unit(group)[dimension]
        return bool(part.start % unit or (part.stop % unit and part.stop != size))

    def check_group(self, inputs: int, group: int) -> None:
        """SoliError for a group that the format does not have, or that does not fit so many input features."""
        if group not in self.groups:
            groups = " or ".join(str(group) for group in sorted(self.groups))
            raise SoliError(f"{self.name} weights have groups of {groups}, not {group}")

    def quantize(self, weight_OI: Tensor, group: int | None = None) -> QuantizedWeight:
        """A matrix of any floating dtype in this format, in groups of `group` or the default. SoliError for values
        that the format cannot hold, and for a format that is only read."""
        if not self.is_written:
            raise SoliError(f"{self.name} weights are read from other programs' files, and not made")
        return plain(weight_OI.to(self.values_dtype).contiguous())

    def dequantize(self, values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`QuantizedWeight.dequantize` of these tensors."""
        return values.to(dtype)


@dataclass(frozen=True)
class Fp8Codec(Codec):
    """E4M3 in 128x128 blocks; `ue8m0` makes every scale a power of two."""

    ue8m0: bool = False

    def scale_shape(self, shape: tuple[int, ...], group: int) -> tuple[int, ...]:
        return (*shape[:-2], *fp8.scale_shape(*shape[-2:]))

    def scale_unit(self, group: int) -> tuple[int, int]:
        return group, group

    def quantize(self, weight_OI: Tensor, group: int | None = None) -> QuantizedWeight:
        values_OI, scale_PQ = fp8.quantize(weight_OI, self.ue8m0)
        return QuantizedWeight(self.name, values_OI, scale_PQ, tuple(weight_OI.shape), fp8.BLOCK)

    def dequantize(self, values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert scale is not None
        return fp8.dequantize(values, scale, dtype)


@dataclass(frozen=True)
class IntegerCodec(Codec):
    """`bits` 8, or 4 with two values to a byte."""

    bits: int

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] * self.bits // 8)

    def scale_shape(self, shape: tuple[int, ...], group: int) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // group)

    def check_group(self, inputs: int, group: int) -> None:
        super().check_group(inputs, group)
        if inputs % group:
            raise SoliError(f"{inputs} input features are no multiple of the group of {group}")

    def fitting_group(self, inputs: int, largest: int) -> int | None:
        """The largest group up to `largest` that divides `inputs`; None where none does."""
        groups = [group for group in self.groups if group <= largest and inputs % group == 0]
        return max(groups, default=None)

    def quantize(self, weight_OI: Tensor, group: int | None = None) -> QuantizedWeight:
        if not self.is_written:
            return super().quantize(weight_OI, group)
        group = group or self.groups[0]
        values_OI, scale_OG = integer.quantize(weight_OI, self.bits, group)
        return QuantizedWeight(self.name, values_OI, scale_OG, tuple(weight_OI.shape), group)

    def dequantize(self, values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert scale is not None
        return integer.dequantize(values, scale, self.bits, dtype)


@dataclass(frozen=True)
class Fp8RowCodec(Codec):
    """E4M3 with a scale for each output feature."""

    def scale_shape(self, shape: tuple[int, ...], group: int) -> tuple[int, ...]:
        return tuple(shape[:-1])

    def dequantize(self, values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert scale is not None
        return values.float().mul_(scale[..., None]).to(dtype)


@dataclass(frozen=True)
class Fp4Codec(Codec):
    """E2M1, two values to a byte."""

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // 2)

    def scale_shape(self, shape: tuple[int, ...], group: int) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // group)

    def dequantize(self, values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert scale is not None
        return fp4.dequantize(values, scale, dtype)


FP32: Final = Codec("fp32", torch.float32, None, (0,))
BF16: Final = Codec("bf16", torch.bfloat16, None, (0,))
FP8: Final = Fp8Codec("fp8", torch.float8_e4m3fn, torch.float32, (fp8.BLOCK,))
# int8 gains nothing from smaller groups, int4 does: docs/formats.md.
INT8: Final = IntegerCodec("int8", torch.int8, torch.float16, (128, 64, 32), 8)
INT4: Final = IntegerCodec("int4", torch.uint8, torch.float16, (32, 64, 128), 4)
INT4_BF16: Final = IntegerCodec("int4_bf16", torch.uint8, torch.bfloat16, INT4.groups, 4, is_written=False)
FP8_ROW: Final = Fp8RowCodec("fp8_row", torch.float8_e4m3fn, torch.float32, (0,), is_written=False)
FP4: Final = Fp4Codec("fp4", torch.uint8, torch.float32, fp4.GROUPS, is_written=False)
CODECS: Final[dict[str, Codec]] = {
    codec.name: codec for codec in (FP32, BF16, FP8, INT8, INT4, INT4_BF16, FP8_ROW, FP4)
}


def plain(weight: Tensor) -> QuantizedWeight:
    """A contiguous float32 or bfloat16 tensor (..., O, I) as a QuantizedWeight, without a copy."""
    for codec in (FP32, BF16):
        if weight.dtype == codec.values_dtype:
            return QuantizedWeight(codec.name, weight, None, tuple(weight.shape), 0)
    raise SoliError(f"a plain weight is float32 or bfloat16, not {weight.dtype}")
