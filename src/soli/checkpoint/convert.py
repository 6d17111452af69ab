"""Rewrite a folder in another format, tensor by tensor, MTP modules included, without building the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soli.checkpoint.load import open_checkpoint
from soli.checkpoint.name_map import Slot
from soli.checkpoint.pack import checkpoint_signature, write_pack
from soli.checkpoint.quantization import FORMAT
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.side_files import SIDE_FILES, TOKENIZER_FILES, collect, files_beside, tokenizer_texts
from soli.checkpoint.writer import Encoded, ProgressCallback, Spec, Target, new_folder, write, write_side_files
from soli.config import ModelConfig
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.formats.fp8 import is_ue8m0


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

    FP8 to FP8 keeps values and scales bit for bit, unless `ue8m0` asks for powers of two that the scales are not.
    int8 and int4 are made from high precision or FP8, and are converted only to bf16 or fp32: quantized twice they
    would lose precision twice. Memory: one tensor.

    `pack` writes experts for reading them from disk (soli.checkpoint.pack). Then `target` may be None, which keeps
    every tensor as it is, as any target does that the files are in already; and what was written before an
    interruption is kept for the same command.

    Raises SoliError naming file and tensor; nothing is left at `folder` then.
    """
    checkpoint = open_checkpoint(source, mapped=False, follow_links=False)
    checkpoint.check_router_biases()
    stored_slots = [slot for slot in checkpoint.slots if checkpoint.holds(slot)]
    if pack:
        return _pack(checkpoint, stored_slots, Path(folder), target, progress)
    assert target is not None
    _check_precision(checkpoint, target)
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
class AsStored:
    """A target that keeps every tensor of `checkpoint` as it is, for a pack."""

    checkpoint: Checkpoint

    def specs(self, slot: Slot) -> list[Spec]:
        """The tensors of a slot in the files."""
        names = [slot.name]
        format = FORMAT.get(self.checkpoint.entries[slot.name].dtype)
        if format is not None:
            names.append(slot.scale_name(format))
        return [(name, self.checkpoint.entries[name].dtype, self.checkpoint.entries[name].shape) for name in names]

    def bytes_of(self, slot: Slot) -> int:
        """Bytes of a slot in the files, with its scales."""
        entries = [self.checkpoint.entries[name] for name, _, _ in self.specs(slot)]
        return sum(entry.end - entry.start for entry in entries)

    def config(self, config: ModelConfig) -> dict[str, Any]:
        """`config.json` as it is."""
        return config.to_dict()

    def tensors(self, slot: Slot) -> list[Tensor]:
        """A slot's values, and scales where it has them."""
        return [self.checkpoint.stored(name) for name, _, _ in self.specs(slot)]


def _pack(
    checkpoint: Checkpoint, slots: Sequence[Slot], folder: Path, target: Target | None, progress: ProgressCallback
) -> Conversion:
    layout: Target | AsStored
    if target is None or _is_stored_as(checkpoint, target):
        layout = stored = AsStored(checkpoint)
        fetch, signature = stored.tensors, checkpoint_signature(checkpoint, "as stored")
    else:
        _check_precision(checkpoint, target)
        layout, signature = target, checkpoint_signature(checkpoint, repr(target))

        def fetch(slot: Slot) -> list[Tensor]:
            value = _fetch(checkpoint, slot, target)
            tensors = (value,) if isinstance(value, Tensor) else (value.values, value.scale)
            return [tensor for tensor in tensors if tensor is not None]

    format = target.format if target is not None else "as stored"
    files, notes = collect(checkpoint.folder, SIDE_FILES, checkpoint.config, format)
    size = write_pack(folder, checkpoint.config, slots, layout, fetch, signature, files, progress)
    return _conversion(checkpoint, slots, target if layout is target else None, size, notes)


def _is_stored_as(checkpoint: Checkpoint, target: Target) -> bool:
    """Whether the files have every tensor as `target` would write it, so that nothing needs to be quantized again."""
    stored = AsStored(checkpoint)
    slots = [slot for slot in checkpoint.slots if checkpoint.holds(slot)]
    return bool(checkpoint.quantized_dtypes) and all(stored.specs(slot) == target.specs(slot) for slot in slots)


def _check_precision(checkpoint: Checkpoint, target: Target) -> None:
    if checkpoint.quantized_dtypes & {"I8", "U8"} and target.format not in ("bf16", "fp32"):
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
    weight = checkpoint.quantized(slot)
    if weight is None:
        values = checkpoint.stored(slot.name)
    elif target.codec(slot) is None:
        return checkpoint.values(slot, target.dtype(slot))
    elif target.format == "fp8" and weight.scale is not None and (not target.ue8m0 or is_ue8m0(weight.scale)):
        return weight
    else:
        values = checkpoint.values(slot, torch.float32)
    try:
        return target.encode(slot, values)
    except SoliError as error:
        raise SoliError(f"{checkpoint.entries[slot.name].file}: {error}") from None
