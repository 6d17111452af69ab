"""The memory of the expert store: slots of one size, each with one expert as its files have it.

Direct I/O fills a slot. Before use an expert of a pack is compared with its checksum, and each matrix becomes what
loading makes of the same tensors: its scales are checked, and what memory has otherwise than the files is put in order.
"""

import threading
from collections.abc import Sequence
from math import prod
from typing import Final

import torch
from torch import Tensor

from soli.checksum import crc32
from soli.errors import SoliError
from soli.experts.policy import Key
from soli.experts.reading import new_memory
from soli.experts.sources import ExpertLayout, Matrix, MatrixParts, Part, Sources
from soli.formats.quantized import QuantizedWeight

POISON: Final = 0xFF  # of every byte of a slot before it is filled, in tests: NaN in float formats


class Slots:
    """`count` slots for the experts of `sources`; memory is taken as they fill. `verified` has the experts whose
    checksums were compared, and grows."""

    def __init__(self, sources: Sources, count: int, verified: set[Key]) -> None:
        self._sources, self._size = sources, sources.slot_bytes
        self._verified = verified
        memory = new_memory(max(1, count) * self._size)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._view = memoryview(memory)
        self._making = threading.Lock()  # so that there is one scale at a time beside the slots

    def view(self, slot: int) -> memoryview:
        """A slot's bytes, to be read into."""
        return self._view[slot * self._size : (slot + 1) * self._size]

    def poison(self, slot: int) -> None:
        """Fill a slot with bytes that no weight has."""
        self._bytes[slot * self._size : (slot + 1) * self._size] = POISON

    def prepare(self, key: Key, slot: int) -> Tensor:
        """Make what was read into a slot usable: the addresses (3, 2) of values and scale of gate, up and down, 0 where
        there is no scale. SoliError naming file and tensor for a wrong checksum or scale."""
        source = self._sources.layers[key[0]]
        expert = source.experts[key[1]]
        self._verify(key, slot, expert)
        for matrix, parts in zip(source.matrices, expert.matrices, strict=True):
            if not parts.is_ready:
                self._arrange(slot, matrix, parts)
        first = self._bytes.data_ptr() + slot * self._size
        addresses = [
            [first + parts.values, 0 if parts.scale is None else first + parts.scale] for parts in expert.matrices
        ]
        return torch.tensor(addresses, dtype=torch.int64)

    def weights(self, key: Key, slot: int) -> tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]:
        """Gate, up and down of the expert in a slot, in place."""
        source = self._sources.layers[key[0]]
        gate, up, down = (
            QuantizedWeight(
                matrix.format,
                self._tensor(slot, parts.values, matrix.values_dtype, matrix.values_shape),
                None
                if matrix.scale_dtype is None or parts.scale is None
                else self._tensor(slot, parts.scale, matrix.scale_dtype, matrix.scale_shape),
                matrix.shape,
                matrix.group,
            )
            for matrix, parts in zip(source.matrices, source.experts[key[1]].matrices, strict=True)
        )
        return gate, up, down

    def _verify(self, key: Key, slot: int, layout: ExpertLayout) -> None:
        """Compare an expert of a pack with its checksum, the first time that it is read."""
        if layout.checksum is None or key in self._verified:
            return
        if crc32(self.view(slot)[: layout.reads[0].needed]) != layout.checksum:
            entry = layout.matrices[0].tensors[0].entry
            raise SoliError(
                f"{entry}: what was read does not have the checksum of its expert: pack the model again"
            )
        self._verified.add(key)

    def _arrange(self, slot: int, matrix: Matrix, parts: MatrixParts) -> None:
        """Put values and scale of a matrix where they are used, made of its tensors as when it is loaded."""
        values, *companions = [self._as_read(slot, part) for part in parts.tensors]
        layout = parts.layout
        if layout is None:
            return self._put(slot, parts.values, values)
        if layout.order is not None:
            ordered = self._tensor(slot, parts.values, matrix.values_dtype, matrix.values_shape)
            layout.order(values.view(torch.uint8), ordered)
            values = ordered
        with self._making:
            try:
                weight = layout.make(matrix.shape, values, *companions)
            except SoliError as error:
                raise SoliError(f"{parts.tensors[1].entry}: {error}") from None
            assert (weight.format, weight.group) == (matrix.format, matrix.group)
            self._put(slot, parts.values, weight.values)
            if weight.scale is not None and parts.scale is not None:
                self._put(slot, parts.scale, weight.scale)

    def _as_read(self, slot: int, part: Part) -> Tensor:
        """A tensor where it was read, or a copy where its place is not aligned."""
        start = slot * self._size + part.offset
        raw = self._bytes[start : start + part.nbytes]
        return (raw.clone() if start % part.dtype.itemsize else raw).view(part.dtype).view(part.entry.shape)

    def _put(self, slot: int, offset: int, tensor: Tensor) -> None:
        place = self._tensor(slot, offset, tensor.dtype, tensor.shape)
        if place.data_ptr() != tensor.data_ptr():
            place.copy_(tensor)

    def _tensor(self, slot: int, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        start = slot * self._size + offset
        return self._bytes[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
