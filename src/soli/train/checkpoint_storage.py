"""How torch.distributed.checkpoint stores a run's state: safetensors files in one folder, and nothing else.

A tensor is called `part/name` and is stored under `name` in `part.safetensors`, or, when N > 1 processes save, in
chunks in `part-00001-of-0000N.safetensors` to `part-0000N-of-0000N.safetensors`: process n writes the chunks it holds.
The header of a chunk that is not the whole tensor has its first index and the tensor's shape, so the files alone
describe their content, and any number of processes can read what any other number wrote. Every header of one checkpoint
has the digest of its state.json, which begins with a random id: files of two checkpoints are not mixed.

Rejected: a missing file of N, a damaged header, a tensor of which chunks are missing or disagree on its shape.
"""

import dataclasses
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from soli.atomic_file import sync
from soli.checkpoint.shard import FILE_DTYPE, TORCH_DTYPE, Shard, encode_header
from soli.errors import SoliError
from soli.input_files import kind_of, parse_json

STATE_DIGEST = "state_sha256"  # key in a header's metadata; checkpoints of version 0.2 and before have none
CHUNKS = "pieces"  # key in a header's metadata: {name: [first index, shape of the whole tensor]}, as JSON


class _OneFolder:
    """What torch asks a writer and a reader alike: a folder is used once, and each process plans for itself."""

    def reset(self, state_digest: str | os.PathLike[str] | None = None) -> None:
        pass

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, state_digest: str | os.PathLike[str]) -> bool:
        return True


class StateWriter(_OneFolder, dcp.StorageWriter):
    """Writes one state into `folder`. `create` runs in one process before anything is written, `commit` in the same
    one when the files of all processes are on disk. That process's `state_digest` is the one that is stored."""

    def __init__(
        self, folder: Path, create: Callable[[], None], commit: Callable[[], None], state_digest: str
    ) -> None:
        self.folder = folder
        self.state_digest = state_digest
        self.create = create
        self.commit = commit

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.create()

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        # Every process writes a file of each part, even an empty one, so that a missing file is noticed.
        parts = sorted({item.index.fqn.partition("/")[0] for plan in plans for item in plan.items})
        world = len(plans)
        return [
            dataclasses.replace(plan, storage_data=(parts, n, world, self.state_digest))
            for n, plan in enumerate(plans)
        ]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        parts, rank, world, state_digest = plan.storage_data
        items = defaultdict(list)
        for item in plan.items:
            items[item.index.fqn.partition("/")[0]].append(item)
        for part in parts:
            _write(self.folder / _file_name(part, rank, world), items[part], planner, state_digest)
        written: Future[list[WriteResult]] = Future()
        written.set_result([])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.commit()


class StateReader(_OneFolder, dcp.StorageReader):
    """Reads the named parts of a state from `folder`; `tensors` describes what it holds, by full name."""

    def __init__(self, folder: Path, parts: tuple[str, ...]) -> None:
        """Open every file and check that each tensor is complete. SoliError names the file or the tensor."""
        self.folder = folder
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.shards: dict[MetadataIndex, Shard] = {}
        self.state_digests: dict[Path, str | None] = {}
        for part in parts:
            for file in _part_files(folder, part):
                self._add(part, Shard(file))
        for name, stored in self.tensors.items():
            count = sum(prod(chunk.sizes) for chunk in stored.chunks)
            size = prod(stored.size)
            if count != size:
                raise SoliError(f"{folder}: {name} has {count} of its {size} values; the checkpoint is damaged")

    def _add(self, part: str, shard: Shard) -> None:
        self.state_digests[shard.file] = shard.metadata.get(STATE_DIGEST)
        chunks = parse_json(shard.metadata.get(CHUNKS, "{}"), f"{shard.file}: {CHUNKS} in its header")
        if not isinstance(chunks, dict):
            raise SoliError(f"{shard.file}: {CHUNKS} in its header is {kind_of(chunks)}, not an object")
        try:
            for name, entry in shard.entries.items():
                offset, size = map(torch.Size, chunks.get(name, ([0] * len(entry.shape), entry.shape)))
                full = f"{part}/{name}"
                properties = TensorProperties(dtype=TORCH_DTYPE[entry.dtype])
                whole = self.tensors.setdefault(full, TensorStorageMetadata(properties, size, []))
                if whole.size != size:
                    raise ValueError(f"{name} is of shape {tuple(size)} here, {tuple(whole.size)} elsewhere")
                whole.chunks.append(ChunkStorageMetadata(offset, torch.Size(entry.shape)))
                self.shards[MetadataIndex(full, offset)] = shard
        except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
            raise SoliError(f"{shard.file}: its header cannot be understood ({error})") from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(dict(self.tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        for item in plan.items:
            stored = self.shards[item.storage_index].tensor(item.storage_index.fqn.partition("/")[2])
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                stored = stored.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(stored)
            planner.commit_tensor(item, target)
        read: Future[None] = Future()
        read.set_result(None)
        return read


def load(reader: StateReader, state: dict[str, Tensor]) -> None:
    """Fill tensors in place by full name, each process its own chunks. SoliError names what is missing or misshapen."""
    check_shapes(reader, state)
    allow_one_process()
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # Every process reads by itself: there is nothing to agree on, so none waits for one that failed.
    dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)


def check_shapes(reader: StateReader, state: dict[str, Tensor]) -> None:
    """SoliError where a tensor, by full name, is not stored, or in another shape."""
    for name, tensor in state.items():
        stored = reader.tensors.get(name)
        if stored is None:
            raise SoliError(f"{reader.folder} has no {name}; it was written by another recipe")
        if stored.size != tensor.shape:
            shapes = f"{tuple(stored.size)}, not {tuple(tensor.shape)}"
            raise SoliError(f"{reader.folder}: {name} is of shape {shapes}; it was written by another recipe")


def read_region(reader: StateReader, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The values of a tensor, by full name, from `offsets` on, `sizes` of them in each dimension, out of whichever
    chunks have them; memory: those values."""
    stored = reader.tensors[name]
    region = torch.empty(tuple(sizes), dtype=stored.properties.dtype)
    for chunk in stored.chunks:
        starts = list(map(max, offsets, chunk.offsets))
        ends = [
            min(offset + size, first + length)
            for offset, size, first, length in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
        ]
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            continue
        values = reader.shards[MetadataIndex(name, chunk.offsets)].tensor(name.partition("/")[2])
        target = region
        for dimension, (start, end) in enumerate(zip(starts, ends, strict=True)):
            values = values.narrow(dimension, start - chunk.offsets[dimension], end - start)
            target = target.narrow(dimension, start - offsets[dimension], end - start)
        target.copy_(values)
    return region


def allow_one_process() -> None:
    """Silence the warning of torch.distributed.checkpoint that a single process saves or loads: that is intended."""
    warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")


def _file_name(part: str, rank: int, world: int) -> str:
    return f"{part}.safetensors" if world == 1 else f"{part}-{rank + 1:05d}-of-{world:05d}.safetensors"


def _part_files(folder: Path, part: str) -> list[Path]:
    """The files of a part: the single one, or all N. SoliError names one that is missing."""
    numbered = sorted(folder.glob(f"{part}-*-of-*.safetensors"))
    world = int(numbered[0].stem.rpartition("-")[2]) if numbered else 1
    files = [folder / _file_name(part, rank, world) for rank in range(world)]
    for file in files:
        if not file.is_file():
            raise SoliError(f"{file} is missing; remove this checkpoint to resume from the one before")
    return files


def _write(file: Path, items: list[Any], planner: dcp.SavePlanner, state_digest: str) -> None:
    """Write one file tensor by tensor, so that no second copy of the state is made."""
    tensors: dict[str, Tensor] = {}
    chunks: dict[str, Any] = {}
    for item in items:
        name = item.index.fqn.partition("/")[2]
        if name in tensors:
            raise SoliError(f"{file}: {name} would be written in two chunks by one process, which cannot be read back")
        tensors[name] = cast(Tensor, planner.resolve_data(item))
        chunk, size = item.tensor_data.chunk, item.tensor_data.size
        if chunk.sizes != size:
            chunks[name] = [list(chunk.offsets), list(size)]
    specs = [(name, FILE_DTYPE[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    metadata = {STATE_DIGEST: state_digest} | ({CHUNKS: json.dumps(chunks)} if chunks else {})
    head, offsets, _ = encode_header(specs, metadata)
    with file.open("wb") as stream:
        stream.write(head)
        for name in sorted(tensors, key=offsets.__getitem__):
            stream.seek(offsets[name])
            stream.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    sync(file)
