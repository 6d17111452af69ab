"""How config.json says that a folder's weights are quantized, and whether each tensor is quantized as it says.

    fp8          the official files' quantization_config; E4M3 values and `NAME_scale_inv`, one fp32 per 128x128 block
    int8, int4   {"quant_method": "soli", "bits": 8 or 4, ...}; I8 values or U8 bytes and `NAME_scale`, one float16 per
                 group of 32, 64 or 128 inputs; a 4-bit folder may hold 8-bit tensors

A tensor's own dtype and scales determine how it is quantized; the configuration which formats may occur. Problems are
detected from headers alone, each a sentence that names file and tensor.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from soli.checkpoint.name_map import SCALE_SUFFIX, Kind, Slot
from soli.checkpoint.shard import TensorEntry
from soli.config import ModelConfig
from soli.errors import SoliError
from soli.formats.fp8 import BLOCK
from soli.formats.quantized import CODECS
from soli.sections import shown

FORMAT: Final = {"F8_E4M3": "fp8", "I8": "int8", "U8": "int4"}  # dtype in a file -> format of a weight
FLOATS: Final = ("BF16", "F16", "F32")
SCALES: Final = ("F32", "BF16", "F16", "F8_E8M0")  # of FP8 weights; each is exact in fp32
FP8: Final = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
SOLI: Final = "soli"
BITS: Final = {8: frozenset({"I8"}), 4: frozenset({"I8", "U8"})}  # dtypes that a folder of 8 or 4 bits may hold


def quantized_dtypes(folder: Path, config: ModelConfig) -> frozenset[str]:
    """The dtypes of quantized tensors that config.json announces; any other quantization is rejected by name."""
    announced = config.quantization_config
    if announced is None:
        return frozenset()
    if announced.get("quant_method") == SOLI:
        if type(announced.get("bits")) is not int or announced["bits"] not in BITS:
            _reject(folder, "bits", announced.get("bits"), "8 or 4")
        return BITS[announced["bits"]]
    for field, only_value in FP8.items():
        if announced.get(field, only_value if field == "fmt" else None) != only_value:
            _reject(folder, field, announced.get(field), f"only {only_value!r}")
    return frozenset({"F8_E4M3"})


def describe_integers(bits: int, group: int, int8_modules: Sequence[str], high: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of an int8 or int4 folder: `int8_modules` have 8 bits in an int4 folder, the tensors `high`
    are not quantized."""
    return {
        "quant_method": SOLI,
        "bits": bits,
        "group_size": group,
        "scale_dtype": "float16",
        **({"modules_in_8_bits": list(int8_modules)} if bits == 4 else {}),
        "modules_to_not_convert": module_patterns(high),
    }


def module_patterns(names: Iterable[str]) -> list[str]:
    """Tensors' names as modules, with a star for each number: one pattern for all layers and experts."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")) for name in names))


def slot_problems(slot: Slot, entries: Mapping[str, TensorEntry], announced: frozenset[str]) -> Iterator[str]:
    """What is wrong with a tensor that is present: its shape, its dtype, its scales."""
    entry = entries[slot.name]
    format = FORMAT.get(entry.dtype)
    if (format == "fp8" and slot.kind is not Kind.LINEAR) or not slot.integer:
        format = None
    shape = CODECS[format].values_shape(slot.shape) if format is not None else slot.shape
    own_scale = slot.scale_name(format) if format is not None else None
    if entry.shape != shape:
        yield f"{entry} has shape {entry.shape}, but config.json asks for {shape}"
    if format is None and entry.dtype not in FLOATS:
        yield f"{entry} is {entry.dtype}, but a {slot.kind.value} must be one of {', '.join(FLOATS)}"
    for name in dict.fromkeys(map(slot.scale_name, SCALE_SUFFIX)):
        if name in entries and name != own_scale:
            yield f"{entries[name]} is a scale, but {slot.name} is {entry.dtype} and needs none"
    if format is None or own_scale is None:
        return
    format_name = "FP8" if format == "fp8" else format
    if entry.dtype not in announced:
        yield f"{entry} is {format_name}, but config.json has no quantization_config for it"
    elif own_scale not in entries:
        yield f"{entry} is {format_name}, but its scales {own_scale} are missing"
    else:
        yield from _scale_problems(slot, entries[own_scale], format)


def _scale_problems(slot: Slot, scale: TensorEntry, format: str) -> Iterator[str]:
    codec, columns = CODECS[format], slot.shape[1]
    if format == "fp8":
        if scale.shape != codec.scale_shape(slot.shape, BLOCK):
            yield f"{scale} has shape {scale.shape}, but blocks of 128x128 need {codec.scale_shape(slot.shape, BLOCK)}"
        elif scale.dtype not in SCALES:
            yield f"{scale} is {scale.dtype}, but scales must be one of {', '.join(SCALES)}"
        return
    allowed = [codec.scale_shape(slot.shape, group) for group in codec.groups if columns % group == 0]
    if scale.shape not in allowed:
        shapes = " or ".join(map(str, allowed)) or "no scales at all"
        yield f"{scale} has shape {scale.shape}, but a weight of shape {slot.shape} needs {shapes}"
    elif scale.dtype != "F16":
        yield f"{scale} is {scale.dtype}, but the scales of {format} must be F16"


def _reject(folder: Path, field: str, value: Any, reads: str) -> None:
    raise SoliError(
        f"{folder / 'config.json'}: quantization_config.{field} is {shown(value)}, but Soli reads {reads}; "
        "fetch the model's bf16 or official FP8 files"
    )
