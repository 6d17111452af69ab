"""How files store a quantized weight: the tensors that it is, and the codec that it has in memory.

A weight `NAME` (`....weight`) of shape (O, I) is its values and tensors beside them, `NAME` with a suffix:

    FP8 blocks     F8_E4M3 (O, I)       _scale_inv (O/128, I/128)        DeepSeek's files; _scale: compressed-tensors
    FP8 tensor     F8_E4M3 (O, I)       _scale, one number               fp8, ModelOpt, compressed-tensors
    FP8 rows       F8_E4M3 (O, I)       _scale (O, 1)                    the same, per channel
    Soli's int8    I8 (O, I)            _scale F16 (O, I/g)
    Soli's int4    U8 (O, I/2)          _scale F16 or BF16 (O, I/g)
    packed int4    I32 (O, I/8)         _scale F16 or BF16 (O, I/g), _shape: compressed-tensors, in weight_packed
    NVFP4          U8 (O, I/2)          _scale F8_E4M3 (O, I/16), _scale_2 F32, a factor: ModelOpt
                                        or _global_scale F32, a divisor: compressed-tensors, in weight_packed
    MXFP4          U8 (O, I/2)          _scale U8 or F8_E8M0 (O, I/32)

Packed int4 has eight values + 8 in a word, the first in its lowest four bits; they are put into the order of Soli's
int4, and its scales stay as they are. One FP8 scale becomes that of every block. Both are without loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Tensor

from soli.checkpoint.shard import TensorEntry
from soli.errors import SoliError
from soli.formats import fp8, integer
from soli.formats.quantized import CODECS, QuantizedWeight
from soli.kernels import cpu

Shape = tuple[int, ...]
E2M1_LARGEST: Final = 6.0
INT4_LARGEST: Final = 8.0
FP8_SCALES: Final = ("F32", "BF16", "F16", "F8_E8M0")  # each is exact in fp32


@dataclass(frozen=True)
class Companion:
    """A tensor beside the values, named as the weight with `suffix`; `shapes` that it may have, of the weight's."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: Callable[[Shape], Sequence[Shape]]


@dataclass(frozen=True)
class WeightLayout:
    """How files store a weight. `formats`: its codec in memory, by the dtype of its scales, the first of `companions`.
    `is_mapped`: this has the bytes of the files. `order`: puts values, as bytes, into the order that they have in
    memory, where that is another; both tensors may be the same. `make`: the weight of shape, values in that order and
    companions; SoliError for scales that no weight has, where it `checks` them."""

    name: str
    dtype: str
    inputs_per_item: int
    companions: tuple[Companion, ...]
    formats: Mapping[str, str]
    make: Callable[..., QuantizedWeight]
    is_mapped: bool = False
    order: Callable[[Tensor, Tensor], None] | None = None
    checks: bool = True

    def read(self, shape: Shape, values: Tensor, *companions: Tensor) -> QuantizedWeight:
        """The weight of these tensors of the files. SoliError for scales that no weight has."""
        if self.order is not None:
            stored = values.view(torch.uint8)
            values = torch.empty_like(stored)
            self.order(stored, values)
        return self.make(shape, values, *companions)

    def values_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], -(-shape[-1] // self.inputs_per_item))

    def format(self, name: str, entries: Mapping[str, TensorEntry]) -> str:
        """The codec that a weight has in memory."""
        return self.formats[entries[name + self.companions[0].suffix].dtype]

    def names(self, name: str) -> list[str]:
        """All tensors of a weight."""
        return [name, *(name + companion.suffix for companion in self.companions)]

    def fits(self, name: str, shape: Shape, entries: Mapping[str, TensorEntry]) -> bool:
        """Whether the files have all tensors of a weight, in shapes that they may have."""
        companions = [(companion, entries.get(name + companion.suffix)) for companion in self.companions]
        return all(entry is not None and entry.shape in companion.shapes(shape) for companion, entry in companions)


def group_of(format: str, shape: Shape, scale_shape: Shape) -> int:
    """The inputs that share a scale, as the codec counts them."""
    groups = CODECS[format].groups
    return groups[0] if len(groups) == 1 else shape[-1] // max(1, scale_shape[-1])


def codec_bytes(format: str, shape: Shape, group: int) -> int:
    """Of values and scales in memory."""
    codec = CODECS[format]
    assert codec.scale_dtype is not None
    values = prod(codec.values_shape(shape)) * codec.values_dtype.itemsize
    return values + prod(codec.scale_shape(shape, group)) * codec.scale_dtype.itemsize


def _blocks(shape: Shape) -> list[Shape]:
    return [fp8.scale_shape(*shape)]


def _one(shape: Shape) -> list[Shape]:
    return [(), (1,), (1, 1)]


def _rows(shape: Shape) -> list[Shape]:
    return [(shape[0], 1), (shape[0],)]


def _groups_of(*groups: int) -> Callable[[Shape], Sequence[Shape]]:
    return lambda shape: [(shape[0], shape[1] // group) for group in groups if shape[1] % group == 0]


def _checked_fp8_scale(scale: Tensor) -> Tensor:
    scale = scale.float()
    fp8.check_scale(scale)
    return scale


def _read_blocks(shape: Shape, values: Tensor, scale: Tensor) -> QuantizedWeight:
    return QuantizedWeight("fp8", values, _checked_fp8_scale(scale), shape, fp8.BLOCK)


def _read_tensor(shape: Shape, values: Tensor, scale: Tensor) -> QuantizedWeight:
    blocks = _checked_fp8_scale(scale).reshape(1, 1).repeat(fp8.scale_shape(*shape))
    return QuantizedWeight("fp8", values, blocks, shape, fp8.BLOCK)


def _read_rows(shape: Shape, values: Tensor, scale: Tensor) -> QuantizedWeight:
    return QuantizedWeight("fp8_row", values, _checked_fp8_scale(scale).reshape(shape[0]), shape, 0)


def _read_int8(shape: Shape, values: Tensor, scale: Tensor) -> QuantizedWeight:
    return QuantizedWeight("int8", values, scale, shape, shape[1] // scale.shape[1])


def _read_int4(shape: Shape, values: Tensor, scale: Tensor) -> QuantizedWeight:
    format = "int4" if scale.dtype == torch.float16 else "int4_bf16"
    return QuantizedWeight(format, values, scale, shape, shape[1] // scale.shape[1])


def _order_packed_int4(words: Tensor, values: Tensor) -> None:
    """Nibbles of neighbours into the order of Soli's int4, by the C++ kernels where there are any."""
    if isinstance(cpu.native.library_or_reason(), cpu.native.Library):
        cpu.order_int4(words, values)
    else:
        values.copy_(integer.from_neighbour_pairs(words))


def _read_packed_int4(shape: Shape, values: Tensor, scale: Tensor, stored_shape: Tensor) -> QuantizedWeight:
    if tuple(stored_shape.tolist()) != shape:
        raise SoliError(f"weight_shape is {tuple(stored_shape.tolist())}, but config.json asks for {shape}")
    _check_scale(scale, INT4_LARGEST)
    return _read_int4(shape, values, scale)


def _read_nvfp4(shape: Shape, values: Tensor, scale: Tensor, factor: Tensor) -> QuantizedWeight:
    return _read_fp4(shape, values, scale.float() * factor.reshape(()))


def _read_divided_nvfp4(shape: Shape, values: Tensor, scale: Tensor, divisor: Tensor) -> QuantizedWeight:
    return _read_fp4(shape, values, scale.float() / divisor.reshape(()))


def _read_mxfp4(shape: Shape, values: Tensor, scale: Tensor) -> QuantizedWeight:
    return _read_fp4(shape, values, scale.view(torch.float8_e8m0fnu).float())


def _read_fp4(shape: Shape, values: Tensor, scale: Tensor) -> QuantizedWeight:
    _check_scale(scale, E2M1_LARGEST)
    return QuantizedWeight("fp4", values, scale, shape, shape[1] // scale.shape[1])


def _check_scale(scale: Tensor, largest: float) -> None:
    """SoliError for scales with which `largest`, a value's largest magnitude, is no finite number."""
    if not bool((scale.abs().amax().float() * largest).isfinite()):  # the largest is NaN where one is
        raise SoliError("a scale is not a finite number, or so large that weights are not")


def _fp8(
    kind: str,
    suffix: str,
    shapes: Callable[[Shape], Sequence[Shape]],
    format: str,
    make: Callable[..., QuantizedWeight],
) -> WeightLayout:
    is_mapped = format == "fp8_row" or kind == "blocks"
    companion = Companion(suffix, FP8_SCALES, shapes)
    return WeightLayout(f"FP8 {kind}", "F8_E4M3", 1, (companion,), dict.fromkeys(FP8_SCALES, format), make, is_mapped)


def _nvfp4(suffix: str, make: Callable[..., QuantizedWeight]) -> WeightLayout:
    companions = Companion("_scale", ("F8_E4M3",), _groups_of(16)), Companion(suffix, ("F32",), _one)
    return WeightLayout("NVFP4", "U8", 2, companions, {"F8_E4M3": "fp4"}, make)


FP8_BLOCKS: Final = _fp8("blocks", "_scale_inv", _blocks, "fp8", _read_blocks)
FP8_BLOCKS_AS_SCALE: Final = _fp8("blocks", "_scale", _blocks, "fp8", _read_blocks)
FP8_TENSOR: Final = tuple(_fp8("tensor", suffix, _one, "fp8", _read_tensor) for suffix in ("_scale", "_scale_inv"))
FP8_ROWS: Final = tuple(_fp8("rows", suffix, _rows, "fp8_row", _read_rows) for suffix in ("_scale", "_scale_inv"))
_SOLI_SCALE: Final = _groups_of(*integer.GROUPS)
INT8: Final = WeightLayout(
    "int8", "I8", 1, (Companion("_scale", ("F16",), _SOLI_SCALE),), {"F16": "int8"}, _read_int8, True, checks=False
)
_INT4_FORMATS: Final = {"F16": "int4", "BF16": "int4_bf16"}
_INT4_SCALE: Final = Companion("_scale", (*_INT4_FORMATS,), _SOLI_SCALE)
INT4: Final = WeightLayout("int4", "U8", 2, (_INT4_SCALE,), _INT4_FORMATS, _read_int4, True, checks=False)
NVFP4: Final = _nvfp4("_scale_2", _read_nvfp4)
DIVIDED_NVFP4: Final = _nvfp4("_global_scale", _read_divided_nvfp4)
_MX_FORMATS: Final = {"U8": "fp4", "F8_E8M0": "fp4"}
MXFP4: Final = WeightLayout(
    "MXFP4", "U8", 2, (Companion("_scale", (*_MX_FORMATS,), _groups_of(32)),), _MX_FORMATS, _read_mxfp4
)


def packed_int4(group: int) -> WeightLayout:
    """compressed-tensors' int4 in groups of `group`."""
    companions = (
        Companion("_scale", (*_INT4_FORMATS,), _groups_of(group)),
        Companion("_shape", ("I32", "I64"), lambda shape: [(2,)]),
    )
    return WeightLayout(
        "packed int4", "I32", 8, companions, _INT4_FORMATS, _read_packed_int4, order=_order_packed_int4
    )


# Whatever may be beside a weight: a tensor of such a name that does not belong to the weight's layout is an error.
SUFFIXES: Final = ("_scale_inv", "_scale", "_shape", "_scale_2", "_global_scale")
