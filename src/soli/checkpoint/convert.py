"""Rewrite a folder in another format, tensor by tensor, MTP modules included, without building the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soli.checkpoint.layouts import FP8_BLOCKS_AS_SCALE
from soli.checkpoint.load import open_checkpoint
from soli.checkpoint.name_map import SCALE_SUFFIX, Slot
from soli.checkpoint.pack import checkpoint_signature, write_pack
from soli.checkpoint.quantization import describe_integers
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.shard import ITEM_BYTES
from soli.checkpoint.side_files import SIDE_FILES, TOKENIZER_FILES, collect, files_beside, tokenizer_texts
from soli.checkpoint.writer import (
    FP8_CONFIG,
    Encoded,
    ProgressCallback,
    Spec,
    Target,
    as_tensors,
    codec_specs,
    new_folder,
    write,
    write_side_files,
)
from soli.config import ModelConfig
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.formats.fp8 import is_ue8m0
from soli.formats.quantized import CODECS, INT4, INT4_BF16, Codec, QuantizedWeight


@dataclass(frozen=True)
class Conversion:
    """Tensors of the model (scales not counted), bytes in source and destination, notes for the user."""

    tensors: int
    bytes_read: int
    bytes_written: int
    notes: Sequence[str]


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    target: Target | None,
    progress: ProgressCallback = lambda written, total: None,
    *,
    pack: bool = False,
) -> Conversion:
    """Write the folder `source` as `target` to the new folder `folder`, with tokenizer, model card and the like.

    FP8 blocks to FP8, and int4 of other programs to int4, keep values and scales bit for bit, unless `ue8m0` asks for
    powers of two that the scales are not, or `group` for another group. Soli's own int8 and int4 are converted only to
    bf16 or fp32: quantized twice they would lose precision twice. Memory: one tensor.

    `pack` writes experts for reading them from disk (soli.checkpoint.pack). Then `target` may be None, which keeps
    every tensor as it is, but for int4 of other programs, which becomes Soli's; so does a target that the files are in
    already. What was written before an interruption is kept for the same command.

    Raises SoliError naming file and tensor; nothing is left at `folder` then.
    """
    checkpoint = open_checkpoint(source, mapped=False, follow_links=False)
    checkpoint.check_router_biases()
    stored_slots = [slot for slot in checkpoint.slots if checkpoint.holds(slot)]
    if pack:
        return _pack(checkpoint, stored_slots, Path(folder), target, progress)
    assert target is not None
    _check_precision(checkpoint, target)
    target = Lossless.of(checkpoint, target)
    files, file_notes = collect(checkpoint.folder, SIDE_FILES, checkpoint.config, target.format)
    bytes_written = write(
        Path(folder),
        checkpoint.config,
        stored_slots,
        target,
        lambda slot: _fetch(checkpoint, slot, target),
        files,
        progress,
    )
    return _conversion(checkpoint, stored_slots, target, bytes_written, file_notes)


@dataclass(frozen=True)
class Lossless(Target):
    """A target that keeps weights of `checkpoint` as they are, where they are in its format already."""

    checkpoint: Checkpoint = field(kw_only=True, repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, target: Target) -> "Lossless":
        return cls(**{one.name: getattr(target, one.name) for one in fields(target)}, checkpoint=checkpoint)

    def codec(self, slot: Slot) -> tuple[Codec, int] | None:
        """As it is in the files, where that is int4 and this target would make it int4 of the same group."""
        quantization = super().codec(slot)
        if quantization is None or quantization[0] is not INT4 or self.checkpoint.format(slot) != INT4_BF16.name:
            return quantization
        group = self.checkpoint.group(slot)
        return (INT4_BF16, group) if self.group in (None, group) else quantization


@dataclass(frozen=True)
class AsStored:
    """A target that keeps every tensor of `checkpoint` as it is, for a pack. Weights of other programs that are int4 or
    FP8 blocks in memory are written so."""

    checkpoint: Checkpoint

    def specs(self, slot: Slot) -> list[Spec]:
        """The tensors of a slot in the files."""
        if self._is_rewritten(slot):
            return codec_specs(slot, CODECS[self.checkpoint.format(slot)], self.checkpoint.group(slot))
        entries = self.checkpoint.entries
        return [(name, entries[name].dtype, entries[name].shape) for name in self.checkpoint.names(slot)]

    def bytes_of(self, slot: Slot) -> int:
        """Bytes of a slot in the files, with its scales."""
        return sum(prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in self.specs(slot))

    def config(self, config: ModelConfig) -> dict[str, Any]:
        """`config.json`, with how weights are quantized where it does not say that as Soli does."""
        slots = [slot for slot in self.checkpoint.slots if self.checkpoint.holds(slot)]
        quantized = [slot for slot in slots if self.checkpoint.layout(slot) is not None]
        if not any(map(self._is_rewritten, slots)):
            announced = self.checkpoint.quantization.announced
            return config.to_dict() | ({"quantization_config": dict(announced)} if announced else {})
        formats = {self.checkpoint.format(slot) for slot in quantized}
        if formats == {"fp8"}:
            return {**config.to_dict(), "quantization_config": FP8_CONFIG}
        group = self.checkpoint.group(quantized[0])
        high = [slot.name for slot in slots if len(slot.shape) == 2 and self.checkpoint.layout(slot) is None]
        return {**config.to_dict(), "quantization_config": describe_integers(4, group, [], high)}

    def check(self) -> None:
        """SoliError for weights in several formats of which one is written as Soli does: config.json announces one."""
        formats = {}
        rewritten = False
        for slot in filter(self.checkpoint.holds, self.checkpoint.slots):
            layout = self.checkpoint.layout(slot)
            if layout is not None:
                formats[self.checkpoint.format(slot).removesuffix("_bf16")] = layout.name
                rewritten = rewritten or self._is_rewritten(slot)
        if rewritten and len(formats) > 1:
            raise SoliError(
                f"{self.checkpoint.folder}: its weights are {' and '.join(formats.values())}, which a pack does not "
                "have as they are: give --to bf16, fp8, int8 or int4"
            )

    def tensors(self, slot: Slot) -> list[Tensor]:
        """A slot's values, and scales where it has them, which are checked."""
        if self._is_rewritten(slot):
            return as_tensors(self.checkpoint.quantized(slot))
        tensors = [self.checkpoint.stored(name) for name, _, _ in self.specs(slot)]
        self.checkpoint.as_weight(slot, tensors)
        return tensors

    def _is_rewritten(self, slot: Slot) -> bool:
        """Whether the files have a weight otherwise than Soli's would that has its codec."""
        layout = self.checkpoint.layout(slot)
        if layout is None or self.checkpoint.format(slot) not in SCALE_SUFFIX:
            return False
        return not layout.is_mapped or layout is FP8_BLOCKS_AS_SCALE


def _pack(
    checkpoint: Checkpoint, slots: Sequence[Slot], folder: Path, target: Target | None, progress: ProgressCallback
) -> Conversion:
    layout: Target | AsStored
    if target is None or _is_stored_as(checkpoint, target):
        layout = stored = AsStored(checkpoint)
        stored.check()
        fetch, signature = stored.tensors, checkpoint_signature(checkpoint, "as stored")
    else:
        _check_precision(checkpoint, target)
        lossless = Lossless.of(checkpoint, target)
        layout, signature = lossless, checkpoint_signature(checkpoint, repr(target))

        def fetch(slot: Slot) -> list[Tensor]:
            return as_tensors(_fetch(checkpoint, slot, lossless))

    format = target.format if target is not None else "as stored"
    files, notes = collect(checkpoint.folder, SIDE_FILES, checkpoint.config, format)
    size = write_pack(folder, checkpoint.config, slots, layout, fetch, signature, files, progress)
    return _conversion(checkpoint, slots, target if layout is target else None, size, notes)


def _is_stored_as(checkpoint: Checkpoint, target: Target) -> bool:
    """Whether the files have every tensor as `target` would write it, so that nothing needs to be quantized again."""
    stored = AsStored(checkpoint)
    slots = [slot for slot in checkpoint.slots if checkpoint.holds(slot)]
    return checkpoint.is_quantized and all(stored.specs(slot) == target.specs(slot) for slot in slots)


def _check_precision(checkpoint: Checkpoint, target: Target) -> None:
    if checkpoint.is_integer and target.format not in ("bf16", "fp32"):
        raise SoliError(
            f"{checkpoint.folder}: its weights are quantized as integers already and would lose precision again as "
            f"{target.format}; convert the folder that it was made from"
        )


def _conversion(
    checkpoint: Checkpoint, slots: Sequence[Slot], target: Target | None, size: int, file_notes: Sequence[str]
) -> Conversion:
    bytes_read = sum(entry.end - entry.start for entry in checkpoint.entries.values())
    modules = [] if target is None else target.unquantized_modules(slots)
    notes = [f"{name} stays bf16: no group of 32, 64 or 128 divides its inputs" for name in modules]
    return Conversion(len(slots), bytes_read, size, [*checkpoint.notes, *file_notes, *notes])


def export_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of the folder `source` to the new folder `folder`, as a tokenizer.json.

    transformers encodes with it as Soli does. SoliError for a folder without a readable tokenizer; nothing is left at
    `folder` then."""
    Tokenizer.from_folder(source)
    files = files_beside(source, TOKENIZER_FILES)
    copies = {name: file for name, file in files.items() if not name.endswith((".py", ".model", ".tiktoken"))}
    with new_folder(folder, sum(file.stat().st_size for file in copies.values())) as partial:
        write_side_files(partial, {**copies, **tokenizer_texts(source)})


def _fetch(checkpoint: Checkpoint, slot: Slot, target: Target) -> Encoded:
    weight, quantization = checkpoint.quantized(slot), target.codec(slot)
    if weight is None:
        values = checkpoint.stored(slot.name)
    elif quantization is None:
        return weight.dequantize(target.dtype(slot))
    elif weight.format == quantization[0].name and weight.group == quantization[1] and _has_scales_of(weight, target):
        return weight
    else:
        values = weight.dequantize(torch.float32)
    try:
        return target.encode(slot, values)
    except SoliError as error:
        raise SoliError(f"{checkpoint.entries[slot.name].file}: {error}") from None


def _has_scales_of(weight: QuantizedWeight, target: Target) -> bool:
    return not target.ue8m0 or weight.scale is None or is_ue8m0(weight.scale)
