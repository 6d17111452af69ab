"""The memory of the expert store: slots of one size, each with one expert as its files have it.

Direct I/O fills a slot; before use an expert of a pack is compared with its checksum, parts whose place is not aligned
and scales in another dtype are copied behind what was read, and FP8 scales are checked.
"""

import mmap
from typing import Final

import torch
from torch import Tensor

from soli.checksum import crc32
from soli.errors import SoliError
from soli.experts.policy import Key
from soli.experts.sources import ALIGNMENT, ExpertLayout, Part, Sources, needs_copy
from soli.formats.fp8 import check_scale
from soli.formats.quantized import QuantizedWeight

POISON: Final = 0xFF  # of every byte of a slot before it is filled, in tests: NaN in float formats


class Slots:
    """`count` slots for the experts of `sources`; memory is taken as they fill. `verified` has the experts whose
    checksums were compared, and grows."""

    def __init__(self, sources: Sources, count: int, verified: set[Key]) -> None:
        self._sources, self._size = sources, sources.slot_bytes
        self._verified = verified
        # Private: pages that could be shared with another process are small ones, which direct I/O pins one by one.
        memory = mmap.mmap(-1, max(1, count) * self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._view = memoryview(memory)

    def view(self, slot: int) -> memoryview:
        """A slot's bytes, to be read into."""
        return self._view[slot * self._size : (slot + 1) * self._size]

    def poison(self, slot: int) -> None:
        """Fill a slot with bytes that no weight has."""
        self._bytes[slot * self._size : (slot + 1) * self._size] = POISON

    def prepare(self, key: Key, slot: int) -> Tensor:
        """Make what was read into a slot usable: the addresses (3, 2) of values and scale of gate, up and down, 0 where
        there is no scale. SoliError naming file and tensor for a wrong checksum or scale."""
        layer, expert = key
        layout = self._sources.layers[layer].experts[expert]
        self._verify(key, slot, layout)
        self._copy_parts(slot, layout)
        matrices = self.weights(key, slot)
        for matrix, scale in zip(matrices, layout.parts[3:], strict=True):
            if matrix.format == "fp8" and matrix.scale is not None and scale is not None:
                try:
                    check_scale(matrix.scale)
                except SoliError as error:
                    raise SoliError(f"{scale.name}: {error}") from None
        return torch.tensor(
            [[w.values.data_ptr(), 0 if w.scale is None else w.scale.data_ptr()] for w in matrices], dtype=torch.int64
        )

    def weights(self, key: Key, slot: int) -> tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]:
        """Gate, up and down of the expert in a slot, in place."""
        source = self._sources.layers[key[0]]
        layout = source.experts[key[1]]
        base, offsets = slot * self._size, _copied_offsets(layout)
        gate, up, down = (
            QuantizedWeight(
                matrix.format,
                self._tensor(base, layout.parts[i], offsets, matrix.values_dtype, matrix.values_shape),
                None
                if matrix.scale_dtype is None
                else self._tensor(base, layout.parts[3 + i], offsets, matrix.scale_dtype, matrix.scale_shape),
                matrix.shape,
                matrix.group,
            )
            for i, matrix in enumerate(source.matrices)
        )
        return gate, up, down

    def _verify(self, key: Key, slot: int, layout: ExpertLayout) -> None:
        """Compare an expert of a pack with its checksum, the first time that it is read."""
        if layout.checksum is None or key in self._verified:
            return
        if crc32(self.view(slot)[: layout.reads[0].needed]) != layout.checksum:
            part = layout.parts[0]
            raise SoliError(
                f"{part.name if part else 'an expert'}: what was read does not have the checksum of its expert: pack "
                "the model again"
            )
        self._verified.add(key)

    def _copy_parts(self, slot: int, layout: ExpertLayout) -> None:
        base = slot * self._size
        for part, offset in _copied_offsets(layout).items():
            raw = self._bytes[base + part.offset : base + part.offset + part.nbytes].clone()
            copied = raw.view(part.dtype).to(part.used_dtype).view(torch.uint8)
            self._bytes[base + offset : base + offset + len(copied)] = copied

    def _tensor(
        self, base: int, part: Part | None, offsets: dict[Part, int], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Tensor:
        """A part where it is used, in the dtype that is computed with."""
        assert part is not None
        nbytes = part.nbytes // part.dtype.itemsize * dtype.itemsize
        start = base + offsets.get(part, part.offset)
        return self._bytes[start : start + nbytes].view(dtype).view(shape)


def _copied_offsets(layout: ExpertLayout) -> dict[Part, int]:
    """Where in a slot each part is copied to that cannot be used where it was read."""
    offsets: dict[Part, int] = {}
    end = sum(read.length for read in layout.reads)
    for part in layout.parts:
        if part is not None and needs_copy(part):
            offsets[part] = end
            end = (end + 4 * part.nbytes + 63) // 64 * 64
    assert end <= layout.nbytes + ALIGNMENT
    return offsets
