"""Rewrite a folder in another format, tensor by tensor, without building the model; MTP modules go along."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soli.checkpoint.load import open_checkpoint
from soli.checkpoint.name_map import Slot
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.writer import SIDE_FILES, Progress, Target, files_beside, write
from soli.errors import SoliError
from soli.formats import fp8


@dataclass(frozen=True)
class Conversion:
    """What was done: tensors of the model (scales not counted), bytes in source and destination, notes for a person."""

    tensors: int
    bytes_read: int
    bytes_written: int
    notes: Sequence[str]


def convert_checkpoint(
    source: str | Path, folder: str | Path, target: Target, progress: Progress = lambda done, total: None
) -> Conversion:
    """Write the folder `source` anew as `target` in the new folder `folder`, tokenizer, model card and the like
    included.

    FP8 to FP8 keeps codes and scales bit for bit, unless `ue8m0` asks for powers of two that the scales are not.
    Memory: one tensor. Raises SoliError naming file and tensor; nothing is left at `folder` then.
    """
    checkpoint = open_checkpoint(source)
    wanted = [slot for slot in checkpoint.slots if checkpoint.holds(slot)]

    def fetch(slot: Slot) -> Tensor | fp8.Packed:
        return _fetch(checkpoint, slot, target)

    side_files = files_beside(checkpoint.folder, SIDE_FILES)
    written = write(Path(folder), checkpoint.config, wanted, target, fetch, side_files, progress)
    read = sum(entry.end - entry.start for entry in checkpoint.entries.values())
    return Conversion(len(wanted), read, written, checkpoint.notes)


def _fetch(checkpoint: Checkpoint, slot: Slot, target: Target) -> Tensor | fp8.Packed:
    packed = checkpoint.packed(slot)
    if packed is None:
        values = checkpoint.stored(slot.name)
    elif not target.packs(slot):
        return checkpoint.values(slot, target.dtype(slot))
    elif not target.ue8m0 or fp8.is_ue8m0(packed.scale_PQ):
        return fp8.Packed(packed.codes_OI, packed.scale_PQ.float())
    else:
        values = checkpoint.values(slot, torch.float32)
    try:
        return target.encode(slot, values)
    except SoliError as error:
        raise SoliError(f"{checkpoint.entries[slot.name].file}: {error}") from None
