"""A part of a folder's model, as one of several processes holds it: some experts whole, rows or columns of other
weights. Nothing else is read, but for weights that are cut in columns or quantized: these are read one at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from soli.checkpoint.layouts import WeightLayout
from soli.checkpoint.name_map import Slot
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.shard import TORCH_DTYPE
from soli.formats.quantized import CODECS, SharedScale
from soli.kernels import QuantizedWeight


@dataclass(frozen=True)
class Cut:
    """Rows (`dimension` 0) or columns (1) `start` to `stop` - 1 of a tensor."""

    dimension: int
    start: int
    stop: int


@dataclass(frozen=True)
class SlotPart:
    """A slot as the part has it, and which part of the `whole` one it is; without a cut all of it."""

    slot: Slot
    whole: Slot
    cut: Cut | None = None


class PartialCheckpoint(Checkpoint):
    """An open folder of which `take` leaves a part: from then on `slots` and all values are those of the part."""

    def __init__(self, folder: Path, mtp: bool = True) -> None:
        """Open and check the whole `folder`, as Checkpoint does, without reading a weight."""
        self._parts: dict[str, SlotPart] = {}
        self._all_slots: tuple[Slot, ...] = ()
        super().__init__(folder, mtp, mapped=False)
        self._all_slots = self.slots

    def take(self, part_of: Callable[[Slot], SlotPart | None]) -> None:
        """Keep `part_of(slot)` of each slot of the folder, in the same order; None leaves it out."""
        parts = [part for part in map(part_of, self._all_slots) if part is not None]
        self._parts = {part.slot.name: part for part in parts}
        self.slots = tuple(part.slot for part in parts)

    def stored(self, name: str) -> Tensor:
        """A tensor as stored; of a cut one that is not quantized the part."""
        part = self._parts.get(name)
        if part is None or part.cut is None or self.layout(part.slot) is not None:
            return super().stored(name)
        cut = part.cut
        if cut.dimension == 0:
            return self._shards[self.entries[name].file].read_rows(name, cut.start, cut.stop)
        return super().stored(name)[:, cut.start : cut.stop].contiguous()

    def quantized(self, slot: Slot) -> QuantizedWeight | None:
        part = self._parts.get(slot.name)
        if part is None or part.cut is None:
            return super().quantized(slot)
        weight = super().quantized(part.whole)
        try:
            return None if weight is None else weight.part(part.cut.dimension, part.cut.start, part.cut.stop)
        except SharedScale as error:
            raise SharedScale(f"{self.entries[slot.name]}: {error}") from None

    def values(self, slot: Slot, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        part = self._parts.get(slot.name)
        if part is None or part.cut is None or self.layout(slot) is None:
            return super().values(slot, dtype, device)
        weight = super().quantized(part.whole)
        assert weight is not None
        cut = part.cut
        return weight.to(device).dequantize(dtype).narrow(cut.dimension, cut.start, cut.stop - cut.start)

    def layout(self, slot: Slot) -> WeightLayout | None:
        return super().layout(self._whole(slot))

    def group(self, slot: Slot) -> int:
        return super().group(self._whole(slot))

    def bytes_in_files(self, slot: Slot) -> int:
        part = self._parts.get(slot.name)
        if part is None or part.cut is None:
            return super().bytes_in_files(slot)
        if self.layout(slot) is not None:
            return self.bytes_as_stored(slot)
        return prod(slot.shape) * TORCH_DTYPE[self.entries[slot.name].dtype].itemsize

    def cuts_blocks(self) -> bool:
        """Whether a part begins or ends within values that share a scale, which then cannot stay quantized."""
        return any(
            part.cut is not None
            and self.layout(part.slot) is not None
            and CODECS[self.format(part.slot)].divides_a_scale(
                self.group(part.slot),
                part.cut.dimension,
                range(part.cut.start, part.cut.stop),
                part.whole.shape[part.cut.dimension],
            )
            for part in self._parts.values()
        )

    def _whole(self, slot: Slot) -> Slot:
        part = self._parts.get(slot.name)
        return slot if part is None else part.whole
