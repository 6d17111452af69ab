"""Write a Hugging Face folder, tensor by tensor, and give it its name only when it is complete.

Shards are planned from the configuration alone, so that memory holds one tensor at a time, never a shard or the model.
Everything is written to a hidden folder beside the destination, which is renamed at the end: the destination is either
complete or not there. A folder that is not empty is never overwritten.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from soli.atomic_file import check_space, remove
from soli.checkpoint.name_map import HEAD, Kind, Slot, slots
from soli.checkpoint.quantization import FP8, describe_integers, module_patterns
from soli.checkpoint.reader import INDEX, SINGLE
from soli.checkpoint.shard import FILE_DTYPE, ITEM_BYTES, encode_header
from soli.checkpoint.side_files import SideFiles
from soli.checkpoint.stacked import in_order_of_stacks, offsets_in_stack, stack_name, stack_spec, stacks
from soli.config import ModelConfig
from soli.errors import SoliError
from soli.formats import HIGH_PRECISION
from soli.formats.quantized import CODECS, INT8, Codec, Fp8Codec, IntegerCodec, QuantizedWeight
from soli.input_files import open_regular

SHARD_BYTES: Final = 5_000_000_000
FP8_CONFIG: Final = FP8 | {"activation_scheme": "dynamic"}

Unit = Sequence[Slot]  # the slots of a stack of experts, or one slot
Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape: one tensor in a header
Encoded = Tensor | QuantizedWeight
Fetch = Callable[[Slot], Encoded]
ProgressCallback = Callable[[int, int], None]  # bytes read or written, bytes in all


@dataclass(frozen=True)
class Target:
    """How to write: `format` bf16, fp32, fp8, int8, int4; `shard_bytes` at most per file.

    `ue8m0`: FP8 scales are powers of two. `group`: inputs that share a scale in int8 or int4, 32, 64 or 128; None takes
    128 for int8 and 32 for int4. A weight whose inputs it does not divide gets the next smaller that does, and keeps
    high precision where none does. `int8_modules`: parts of names in Soli, such as self_attn, whose weights have 8 bits
    in an int4 folder; the head always has.
    """

    format: str
    ue8m0: bool = False
    shard_bytes: int = SHARD_BYTES
    group: int | None = None
    int8_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in HIGH_PRECISION:
            raise SoliError(f"format {self.format!r} is not known; choose one of {', '.join(HIGH_PRECISION)}")
        if self.ue8m0 and self.format != "fp8":
            raise SoliError(f"ue8m0 scales belong to fp8 files, not to {self.format}")
        if self.shard_bytes <= 0:
            raise SoliError(f"shard_bytes is {self.shard_bytes}; it must be positive")
        if self.group is not None and (not self._is_integer or self.group not in INT8.groups):
            raise SoliError(f"group is {self.group} with {self.format}; int8 and int4 take groups of 32, 64 or 128")
        if self.int8_modules and self.format != "int4":
            raise SoliError(f"int8_modules are weights with 8 bits in an int4 folder, but the format is {self.format}")

    @property
    def _is_integer(self) -> bool:
        return isinstance(CODECS[self.format], IntegerCodec)

    def codec(self, slot: Slot) -> tuple[Codec, int] | None:
        """The format and group of a slot that is quantized; None for all others."""
        default = CODECS[self.format]
        if isinstance(default, Fp8Codec) and slot.kind is Kind.LINEAR:
            return replace(default, ue8m0=self.ue8m0), default.groups[0]
        if not isinstance(default, IntegerCodec) or not slot.integer:
            return None
        codec = INT8 if slot.soli == HEAD or any(part in slot.soli for part in self.int8_modules) else default
        largest = self.group if self.group is not None and codec is default else codec.groups[0]
        group = codec.fitting_group(slot.shape[1], largest)
        return None if group is None else (codec, group)

    def unquantized_modules(self, slots: Sequence[Slot]) -> list[str]:
        """Modules whose weights keep high precision because no group divides their inputs."""
        return module_patterns(
            slot.name for slot in slots if self._is_integer and slot.integer and self.codec(slot) is None
        )

    def dtype(self, slot: Slot) -> torch.dtype:
        """The dtype of a slot that is not quantized; a router's bias is fp32 in every format."""
        return torch.float32 if slot.kind is Kind.ROUTER_BIAS else HIGH_PRECISION[self.format]

    def encode(self, slot: Slot, values: Tensor) -> Encoded:
        """Values of any floating dtype as this target stores them."""
        quantization = self.codec(slot)
        if quantization is None:
            return values.to(self.dtype(slot))
        codec, group = quantization
        try:
            return codec.quantize(values, group)
        except SoliError as error:
            raise SoliError(f"tensor {slot.name}: {error}") from None

    def specs(self, slot: Slot) -> list[Spec]:
        """What a slot becomes in the files: one tensor, or quantized values and scales."""
        quantization = self.codec(slot)
        if quantization is None:
            return [(slot.name, FILE_DTYPE[self.dtype(slot)], slot.shape)]
        return codec_specs(slot, *quantization)

    def bytes_of(self, slot: Slot) -> int:
        """Bytes of a slot in the files, with its scales."""
        return sum(prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in self.specs(slot))

    def config(self, config: ModelConfig) -> dict[str, Any]:
        """`config.json` of what is written: the dtype, and how weights are quantized if they are."""
        d = replace(config, quantization_config=self._quantization(config)).to_dict()
        d.pop("dtype", None)
        return {**d, "torch_dtype": str(HIGH_PRECISION[self.format]).removeprefix("torch.")}

    def _quantization(self, config: ModelConfig) -> dict[str, Any] | None:
        if self.format == "fp8":
            return FP8_CONFIG | ({"scale_fmt": "ue8m0"} if self.ue8m0 else {})
        default = CODECS[self.format]
        if not isinstance(default, IntegerCodec):
            return None
        high = [slot.name for slot in slots(config) if len(slot.shape) == 2 and self.codec(slot) is None]
        return describe_integers(default.bits, self.group or default.groups[0], ["lm_head", *self.int8_modules], high)


def codec_specs(slot: Slot, codec: Codec, group: int) -> list[Spec]:
    """Values and scales of a slot that is quantized."""
    assert codec.scale_dtype is not None
    return [
        (slot.name, FILE_DTYPE[codec.values_dtype], codec.values_shape(slot.shape)),
        (slot.scale_name(codec.name), FILE_DTYPE[codec.scale_dtype], codec.scale_shape(slot.shape, group)),
    ]


def as_tensors(value: Encoded | None) -> list[Tensor]:
    """A slot's values, and scales where it has them."""
    tensors = (value,) if isinstance(value, Tensor) or value is None else (value.values, value.scale)
    return [tensor for tensor in tensors if tensor is not None]


def write(
    folder: Path,
    config: ModelConfig,
    slots_to_write: Sequence[Slot],
    target: Target,
    fetch: Fetch,
    side_files: SideFiles | None = None,
    progress: ProgressCallback = lambda written, total: None,
) -> int:
    """Write slots of a model to the new folder `folder`, each with the value that `fetch` returns, and `side_files`.
    Returns the bytes of all tensors.

    Raises SoliError when the folder is not empty, the disk lacks space, or writing fails; nothing is left then.
    """
    stacked = config.family.stacks_experts and not any(target.codec(slot) for slot in slots_to_write if slot.is_expert)
    units = stacks(in_order_of_stacks(slots_to_write)) if stacked else [[slot] for slot in slots_to_write]
    shards = _split_into_shards(units, target)
    total = sum(map(target.bytes_of, slots_to_write))
    with new_folder(folder, total) as partial:
        names = [SINGLE] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
        ]  # fmt: skip
        written = 0
        for name, shard in zip(names, shards, strict=True):
            for size in _write_shard(partial / name, shard, target, fetch, stacked):
                written += size
                progress(written, total)
        if len(shards) > 1:
            files = zip(names, shards, strict=True)
            weight_map = {name: file for file, shard in files for name, _, _ in _specs(shard, target, stacked)}
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_side_files(partial, side_files or {})
        write_json(partial / "config.json", target.config(config))
    return total


@contextmanager
def new_folder(folder: Path, size: int) -> Iterator[Path]:
    """A hidden folder to fill, renamed to `folder` on success and removed on any failure, an interrupt included."""
    if folder.is_symlink():
        raise SoliError(f"{folder}: is a symlink; give the name of a new folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SoliError(f"{folder}: is there already and not empty; choose a new folder")
    partial = folder.absolute().parent / f".{folder.absolute().name}.partial-{os.getpid()}"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        check_space(folder, partial.parent, size)
        if partial.is_dir() and not partial.is_symlink():  # of a killed process
            remove(partial)
        partial.mkdir()
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise SoliError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            remove(partial)


def _split_into_shards(units: Sequence[Unit], target: Target) -> list[list[Unit]]:
    """Slots in order, split into shards; a weight and its scales share one, and so does a stack."""
    shards: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        size = sum(map(target.bytes_of, unit))
        if shards[-1] and filled + size > target.shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(unit)
        filled += size
    return shards


def _specs(shard: Sequence[Unit], target: Target, stacked: bool) -> list[Spec]:
    """What the tensors of a file are."""
    specs: list[Spec] = []
    for unit in shard:
        is_stack = stacked and unit[0].is_expert
        specs += [stack_spec(unit, FILE_DTYPE[target.dtype(unit[0])])] if is_stack else target.specs(unit[0])
    return specs


def _write_shard(file: Path, shard: Sequence[Unit], target: Target, fetch: Fetch, stacked: bool) -> Iterator[int]:
    """Write one file, yielding the bytes of each slot when it is written."""
    head, offsets, size = encode_header(_specs(shard, target, stacked))
    for unit in shard:
        if stacked and unit[0].is_expert:
            offsets |= offsets_in_stack(unit, FILE_DTYPE[target.dtype(unit[0])], offsets[stack_name(unit[0])])
    with file.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)
        for slot in (slot for unit in shard for slot in unit):
            for (name, dtype, shape), tensor in zip(target.specs(slot), as_tensors(fetch(slot)), strict=True):
                assert (FILE_DTYPE[tensor.dtype], tuple(tensor.shape)) == (dtype, shape), name
                stream.seek(offsets[name])
                stream.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            yield target.bytes_of(slot)
        stream.flush()
        os.fsync(stream.fileno())


def write_side_files(folder: Path, files: SideFiles) -> None:
    """Copy or write files into a folder that is being filled; those of a conversion that was stopped are replaced."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        remove(folder / name)
        with open(folder / name, "xb") as stream:
            if isinstance(content, str):
                stream.write(content.encode())
                continue
            with open_regular(content) as source:
                shutil.copyfileobj(source, stream)


def write_json(file: Path, value: Any) -> None:
    """Write JSON for people and programs."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
