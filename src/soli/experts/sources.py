"""Where each expert of a model is in its files, and where its bytes go in a slot of the cache.

An expert has six parts: gate, up and down, and the scales of each where its format has scales. Parts that are near each
other in a file are read together. Direct I/O reads whole blocks of ALIGNMENT bytes into memory that is aligned alike,
so a part has the same address in its slot as in its file, modulo ALIGNMENT.

Shapes: E experts, D hidden, F expert width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import torch

from soli.checkpoint.name_map import Slot
from soli.checkpoint.pack import checksums
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.shard import TORCH_DTYPE, TensorEntry
from soli.errors import SoliError
from soli.formats.quantized import CODECS
from soli.kernels.cpu.native import FORMATS

ALIGNMENT: Final = 4096  # bytes, of direct I/O on every common file system
MERGE_GAP: Final = 32 * 1024  # bytes that are read in vain rather than by another read
MATRICES: Final = ("gate", "up", "down")
READABLE: Final = "bf16, fp32, FP8 blocks and Soli's int8 and int4"


class Read(NamedTuple):
    """Bytes `start` ... `start + length - 1` of a file, by its number, to `offset` of a slot. All are multiples of
    ALIGNMENT, so the last block may end behind the file; `needed` bytes must be there."""

    file: int
    start: int
    length: int
    offset: int
    needed: int


class Part(NamedTuple):
    """Values or scale of one matrix: its first byte in the slot, as read, its dtype there and where it is used, and its
    tensor's name, for messages."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    used_dtype: torch.dtype
    name: str


class ExpertLayout(NamedTuple):
    """How one expert is read, and the six parts of it: gate, up, down and their scales, None where there is none.

    `checksum`: CRC-32 of the first `needed` bytes of the one read, where the files are a pack.
    """

    reads: tuple[Read, ...]
    parts: tuple[Part | None, ...]
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


@dataclass(frozen=True)
class LayerSource:
    """The experts of one layer: `name` of the module, what each matrix is, where each expert's bytes are."""

    name: str
    layer: int  # as the files number it
    matrices: tuple[Matrix, Matrix, Matrix]  # gate, up, down
    experts: tuple[ExpertLayout, ...]

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights and scales, without what alignment adds."""
        return sum(part.nbytes for part in self.experts[0].parts if part is not None)


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
    experts = tuple(_expert(checkpoint, triple, files) for triple in triples)
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
    layout = checkpoint.layout(slot)
    if layout is None and entry.dtype not in ("BF16", "F32"):
        raise SoliError(f"{entry} is {entry.dtype}; experts are read from disk in {READABLE}")
    format = checkpoint.format(slot)
    if layout is not None and not (layout.is_mapped and format in FORMATS):
        target = "as-is" if format.startswith("int") else "int8"
        raise SoliError(
            f"{entry} is {layout.name}; experts are read from disk in {READABLE}: `soli convert SRC DST --to {target} "
            "--pack` writes a folder in one of these"
        )
    return Matrix(format, checkpoint.group(slot), (slot.shape[0], slot.shape[1]))


def _expert(checkpoint: Checkpoint, slots: Sequence[Slot], files: dict[Path, int]) -> ExpertLayout:
    names = [checkpoint.names(slot) for slot in slots]
    values = [checkpoint.entries[one[0]] for one in names]
    scales = [checkpoint.entries[one[1]] if len(one) > 1 else None for one in names]
    scale_dtypes = [CODECS[checkpoint.format(slot)].scale_dtype for slot in slots]
    return layout([*values, *scales], files, [*(TORCH_DTYPE[entry.dtype] for entry in values), *scale_dtypes])


def layout(
    entries: Sequence[TensorEntry | None], files: dict[Path, int], dtypes: Sequence[torch.dtype | None]
) -> ExpertLayout:
    """Plan the reads of an expert whose parts are `entries`, used in `dtypes`. `files` numbers files, and grows."""
    present = [entry for entry in entries if entry is not None and entry.end > entry.start]
    present.sort(key=lambda entry: (str(entry.file), entry.start))
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
    parts = tuple(
        None if entry is None
        else Part(
            offsets.get(entry.name, 0), entry.end - entry.start, TORCH_DTYPE[entry.dtype],
            dtype or TORCH_DTYPE[entry.dtype], str(entry),
        )
        for entry, dtype in zip(entries, dtypes, strict=True)
    )  # fmt: skip
    return ExpertLayout(tuple(reads), parts, end + _copied_bytes(parts))


def _copied_bytes(parts: Sequence[Part | None]) -> int:
    """Room behind what is read, for parts that are copied before use: see `needs_copy`."""
    return aligned(sum(64 + 4 * part.nbytes for part in parts if part is not None and needs_copy(part)))


def needs_copy(part: Part) -> bool:
    """Whether a part cannot be used where it was read: its place is not aligned, or scales need another dtype."""
    return bool(part.offset % part.dtype.itemsize) or part.dtype != part.used_dtype


def aligned(size: int) -> int:
    """`size` rounded up to whole blocks of direct I/O."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
