"""Where each expert of a model is in its files, and where its bytes go in a slot of the cache.

An expert is gate, up and down, and each of these its values and the tensors beside them (soli/checkpoint/layouts.py).
Those that are near each other in a file are read together. Direct I/O reads whole blocks of ALIGNMENT bytes into memory
that is aligned alike, so a tensor has the same address in its slot as in its file, modulo ALIGNMENT.

What memory has as the files do is used where it was read. Values of the same size in another order replace what was
read, and what takes more bytes than in the files, such as one scale that becomes that of every block, has a place
behind.

Shapes: E experts, D hidden, F expert width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Final, NamedTuple

import torch

from soli.checkpoint.layouts import WeightLayout
from soli.checkpoint.name_map import Slot
from soli.checkpoint.pack import checksums
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.shard import TORCH_DTYPE, TensorEntry
from soli.errors import SoliError
from soli.formats.quantized import CODECS

ALIGNMENT: Final = 4096  # bytes, of direct I/O on every common file system
MERGE_GAP: Final = 32 * 1024  # bytes that are read in vain rather than by another read
CACHE_LINE: Final = 64  # bytes


class Read(NamedTuple):
    """Bytes `start` ... `start + length - 1` of a file, by its number, to `offset` of a slot. All are multiples of
    ALIGNMENT, so the last block may end behind the file; `needed` bytes must be there."""

    file: int
    start: int
    length: int
    offset: int
    needed: int


class Part(NamedTuple):
    """A tensor as it was read: its first byte in the slot, and what it is in its file."""

    offset: int
    entry: TensorEntry

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPE[self.entry.dtype]

    @property
    def nbytes(self) -> int:
        return self.entry.end - self.entry.start

    def is_usable(self, dtype: torch.dtype, nbytes: int) -> bool:
        """Whether so many bytes of `dtype` can be used in the place of this tensor."""
        return self.nbytes == nbytes and self.offset % dtype.itemsize == 0


class MatrixParts(NamedTuple):
    """The tensors of one matrix, its values first, how they make a weight (None: the values are it), and the first
    bytes in the slot of the values and the scale that are computed with; no scale: None."""

    tensors: tuple[Part, ...]
    layout: WeightLayout | None
    values: int
    scale: int | None

    @property
    def is_ready(self) -> bool:
        """Whether it is computed with as it was read."""
        offsets = self.values, self.scale
        in_place = all(offset in (None, part.offset) for offset, part in zip(offsets, self.tensors, strict=False))
        return in_place and (self.layout is None or (self.layout.order is None and not self.layout.checks))


class ExpertLayout(NamedTuple):
    """How one expert is read, and what of it is where: gate, up and down.

    `checksum`: CRC-32 of the first `needed` bytes of the one read, where the files are a pack.
    """

    reads: tuple[Read, ...]
    matrices: tuple[MatrixParts, ...]
    nbytes: int  # of a slot, aligned
    checksum: int | None = None


@dataclass(frozen=True)
class Matrix:
    """What the gates, ups or downs of all experts of a layer have in common."""

    format: str
    group: int
    shape: tuple[int, int]

    @property
    def values_dtype(self) -> torch.dtype:
        return CODECS[self.format].values_dtype

    @property
    def values_shape(self) -> tuple[int, ...]:
        return CODECS[self.format].values_shape(self.shape)

    @property
    def scale_dtype(self) -> torch.dtype | None:
        return CODECS[self.format].scale_dtype

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return CODECS[self.format].scale_shape(self.shape, self.group)

    @property
    def values_bytes(self) -> int:
        return prod(self.values_shape) * self.values_dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        return 0 if self.scale_dtype is None else prod(self.scale_shape) * self.scale_dtype.itemsize


@dataclass(frozen=True)
class LayerSource:
    """The experts of one layer: `name` of the module, what each matrix is, where each expert's bytes are."""

    name: str
    layer: int  # as the files number it
    matrices: tuple[Matrix, Matrix, Matrix]  # gate, up, down
    experts: tuple[ExpertLayout, ...]

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights and scales, as computed with."""
        return sum(matrix.values_bytes + matrix.scale_bytes for matrix in self.matrices)


@dataclass(frozen=True)
class Sources:
    """All routed experts of a model, and the files that they are in."""

    files: tuple[Path, ...]
    layers: tuple[LayerSource, ...]

    @cached_property
    def slot_bytes(self) -> int:
        """Of a slot that any of the experts fits in."""
        return max(expert.nbytes for layer in self.layers for expert in layer.experts)

    @cached_property  # read for every layer of every token
    def count(self) -> int:
        """Experts in all layers together."""
        return sum(len(layer.experts) for layer in self.layers)


def sources_of(checkpoint: Checkpoint) -> Sources:
    """Where the routed experts of an open folder are. SoliError for experts whose formats differ within a layer."""
    files: dict[Path, int] = {}
    modules: dict[str, list[Slot]] = {}
    for slot in checkpoint.slots:
        if slot.expert is not None:
            modules.setdefault(slot.soli.rpartition(".")[0], []).append(slot)
    layers = [_layer(checkpoint, name, slots, files) for name, slots in modules.items()]
    if not layers:
        raise SoliError(f"{checkpoint.folder}: the model has no routed experts that could be read from disk as needed")
    return Sources(tuple(files), tuple(layers))


def _layer(checkpoint: Checkpoint, name: str, slots: Sequence[Slot], files: dict[Path, int]) -> LayerSource:
    """`slots` has gate, up and down of each expert, one expert after another."""
    triples = [tuple(slots[at : at + 3]) for at in range(0, len(slots), 3)]
    kinds = {tuple(_matrix(checkpoint, slot) for slot in triple) for triple in triples}
    if len(kinds) > 1:
        raise SoliError(
            f"{checkpoint.folder}: the experts of {name} are stored in different formats; `soli convert` writes a "
            "folder in which they are alike"
        )
    matrices = kinds.pop()
    assert len(matrices) == 3
    layer = slots[0].layer
    assert layer is not None
    experts = tuple(_expert(checkpoint, triple, matrices, files) for triple in triples)
    file = checkpoint.entries[slots[0].name].file
    crcs = checksums(checkpoint.metadata(file), file)
    if crcs is not None:
        if len(crcs) != len(experts) or any(len(expert.reads) != 1 for expert in experts):
            raise SoliError(f"{file}: is a pack, but its experts are not as its header says: pack it again")
        pairs = zip(experts, crcs, strict=True)
        experts = tuple(expert._replace(checksum=crc) for expert, crc in pairs)
    return LayerSource(name, layer, matrices, experts)


def _matrix(checkpoint: Checkpoint, slot: Slot) -> Matrix:
    entry = checkpoint.entries[slot.name]
    if checkpoint.layout(slot) is None and entry.dtype not in ("BF16", "F32"):
        raise SoliError(
            f"{entry} is {entry.dtype}; experts are read from disk in bf16, fp32 and quantized formats: "
            f"`soli convert {checkpoint.folder} DST --to bf16 --pack` writes a folder of them"
        )
    return Matrix(checkpoint.format(slot), checkpoint.group(slot), (slot.shape[0], slot.shape[1]))


def _expert(
    checkpoint: Checkpoint, slots: Sequence[Slot], matrices: Sequence[Matrix], files: dict[Path, int]
) -> ExpertLayout:
    names = [checkpoint.names(slot) for slot in slots]
    entries = [[checkpoint.entries[name] for name in group] for group in names]
    reads, offsets, end = _plan_reads([entry for group in entries for entry in group], files)
    parts = []
    for slot, matrix, group in zip(slots, matrices, entries, strict=True):
        tensors = tuple(Part(offsets.get(one.name, 0), one) for one in group)
        values, end = _place(tensors[0], matrix.values_dtype, matrix.values_bytes, end)
        scale = None
        if matrix.scale_dtype is not None:
            scale, end = _place(tensors[1], matrix.scale_dtype, matrix.scale_bytes, end)
        parts.append(MatrixParts(tensors, checkpoint.layout(slot), values, scale))
    return ExpertLayout(reads, tuple(parts), aligned(end))


def _plan_reads(
    entries: Sequence[TensorEntry], files: dict[Path, int]
) -> tuple[tuple[Read, ...], dict[str, int], int]:
    """The reads of these tensors, the first byte of each in a slot, by name, and the first behind them all. `files`
    numbers files, and grows."""
    present = sorted((one for one in entries if one.end > one.start), key=lambda one: (str(one.file), one.start))
    runs: list[list[TensorEntry]] = [[entry] for entry in present[:1]]
    for one, other in pairwise(present):
        near = one.file == other.file and other.start - one.end <= MERGE_GAP
        if near:
            runs[-1].append(other)
        else:
            runs.append([other])
    reads: list[Read] = []
    offsets: dict[str, int] = {}
    end = 0
    for run in runs:
        start = run[0].start // ALIGNMENT * ALIGNMENT
        length = aligned(run[-1].end - start)
        number = files.setdefault(run[0].file, len(files))
        reads.append(Read(number, start, length, end, run[-1].end - start))
        offsets |= {entry.name: end + entry.start - start for entry in run}
        end += length
    return tuple(reads), offsets, end


def _place(part: Part, dtype: torch.dtype, nbytes: int, end: int) -> tuple[int, int]:
    """Where values or a scale are used that are made of a tensor, and the first byte behind all."""
    if part.is_usable(dtype, nbytes):
        return part.offset, end
    start = -(-end // CACHE_LINE) * CACHE_LINE
    return start, start + nbytes


def aligned(size: int) -> int:
    """`size` rounded up to whole blocks of direct I/O."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
