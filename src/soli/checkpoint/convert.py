"""Rewrite a folder in another format, tensor by tensor, MTP modules included, without building the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from soli.checkpoint.load import open_checkpoint
from soli.checkpoint.name_map import Slot
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.writer import SIDE_FILES, Encoded, ProgressCallback, Target, files_beside, write
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
    source: str | Path, folder: str | Path, target: Target, progress: ProgressCallback = lambda written, total: None
) -> Conversion:
    """Write the folder `source` as `target` to the new folder `folder`, with tokenizer, model card and the like.

    FP8 to FP8 keeps values and scales bit for bit, unless `ue8m0` asks for powers of two that the scales are not.
    int8 and int4 are made from high precision or FP8, and are converted only to bf16 or fp32: quantized twice they
    would lose precision twice. Memory: one tensor.

    Raises SoliError naming file and tensor; nothing is left at `folder` then.
    """
    checkpoint = open_checkpoint(source, mapped=False, follow_links=False)
    checkpoint.check_router_biases()
    if checkpoint.quantized_dtypes & {"I8", "U8"} and target.format not in ("bf16", "fp32"):
        raise SoliError(
            f"{source}: its weights are quantized as integers already and would lose precision again as "
            f"{target.format}; convert the folder that it was made from"
        )
    stored_slots = [slot for slot in checkpoint.slots if checkpoint.holds(slot)]
    bytes_written = write(
        Path(folder),
        checkpoint.config,
        stored_slots,
        target,
        lambda slot: _fetch(checkpoint, slot, target),
        files_beside(checkpoint.folder, SIDE_FILES),
        progress,
    )
    bytes_read = sum(entry.end - entry.start for entry in checkpoint.entries.values())
    notes = [
        f"{name} stays bf16: no group of 32, 64 or 128 divides its inputs"
        for name in target.unquantized_modules(stored_slots)
    ]
    return Conversion(len(stored_slots), bytes_read, bytes_written, [*checkpoint.notes, *notes])


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
