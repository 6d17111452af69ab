"""Where torch.distributed.checkpoint puts a run's state: safetensors files in one folder, and nothing else.

A tensor is called `part/name` and lies under `name` in `part.safetensors`, or, when N > 1 processes save, in pieces in
`part-00001-of-0000N.safetensors` to `part-0000N-of-0000N.safetensors`: process n writes those it holds. A piece that is
not the whole tensor has its first index and the tensor's shape in its file's header, so the files alone say what is in
them, and any number of processes can read what any other number wrote.

Refused: a missing file of N, a damaged header, a tensor of which pieces are missing or disagree on its shape.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
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

from soli.checkpoint.shard import FILE_DTYPE, TORCH_DTYPE, Shard, encode_header
from soli.errors import SoliError

PIECES = "pieces"  # in a header's metadata: {name: [first index, shape of the whole tensor]}, as JSON


class StateWriter(dcp.StorageWriter):
    """Writes one state into `folder`. `begin` runs in one process before anything is written, `end` in the same one
    when the files of all processes are on disk."""

    def __init__(self, folder: Path, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.folder, self.begin, self.end = folder, begin, end

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.begin()

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        # every process writes a file of each part, be it empty, so that a missing file is noticed
        parts = sorted({_split(item.index.fqn)[0] for plan in plans for item in plan.items})
        return [dataclasses.replace(plan, storage_data=(parts, n, len(plans))) for n, plan in enumerate(plans)]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        parts, rank, world = plan.storage_data
        items = defaultdict(list)
        for item in plan.items:
            items[_split(item.index.fqn)[0]].append(item)
        for part in parts:
            _write(self.folder / _file_name(part, rank, world), items[part], planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.end()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class StateReader(dcp.StorageReader):
    """Reads the named parts of a state from `folder`; `tensors` says what is there, by full name."""

    def __init__(self, folder: Path, parts: tuple[str, ...]) -> None:
        """Open every file and check that each tensor is there whole. SoliError names the file or the tensor."""
        self.folder = folder
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.places: dict[MetadataIndex, Shard] = {}
        for part in parts:
            for file in _part_files(folder, part):
                self._add(part, Shard(file))
        for name, found in self.tensors.items():
            have, want = sum(prod(chunk.sizes) for chunk in found.chunks), prod(found.size)
            if have != want:
                raise SoliError(f"{folder}: {name} has {have} of its {want} values; the checkpoint is damaged")

    def _add(self, part: str, shard: Shard) -> None:
        try:
            pieces = json.loads(shard.metadata.get(PIECES, "{}"))
            for name, entry in shard.entries.items():
                offset, size = map(torch.Size, pieces.get(name, ([0] * len(entry.shape), entry.shape)))
                full, properties = f"{part}/{name}", TensorProperties(dtype=TORCH_DTYPE[entry.dtype])
                whole = self.tensors.setdefault(full, TensorStorageMetadata(properties, size, []))
                if whole.size != size:
                    raise ValueError(f"{name} is of shape {tuple(size)} here, {tuple(whole.size)} elsewhere")
                whole.chunks.append(ChunkStorageMetadata(offset, torch.Size(entry.shape)))
                self.places[MetadataIndex(full, offset)] = shard
        except (ValueError, TypeError, KeyError) as error:
            raise SoliError(f"{shard.file}: its header cannot be understood ({error})") from None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(dict(self.tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        for item in plan.items:
            stored = self.places[item.storage_index].tensor(_split(item.storage_index.fqn)[1])
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                stored = stored.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(stored)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def load(reader: StateReader, state: dict[str, Tensor]) -> None:
    """Fill tensors in place by full name, each process its own pieces. SoliError names what is missing or misshapen."""
    for name, tensor in state.items():
        found = reader.tensors.get(name)
        if found is None:
            raise SoliError(f"{reader.folder} has no {name}; it was written by another recipe")
        if found.size != tensor.shape:
            shapes = f"{tuple(found.size)}, not {tuple(tensor.shape)}"
            raise SoliError(f"{reader.folder}: {name} is of shape {shapes}; it was written by another recipe")
    expect_one_process()
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # every process reads by itself: nothing to agree on, so nobody waits for one that failed
    dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)


def expect_one_process() -> None:
    """Keep torch.distributed.checkpoint from warning that a single process saves or loads: that is what is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")


def flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _split(full: str) -> tuple[str, str]:
    part, _, name = full.partition("/")
    return part, name


def _file_name(part: str, rank: int, world: int) -> str:
    return f"{part}.safetensors" if world == 1 else f"{part}-{rank + 1:05d}-of-{world:05d}.safetensors"


def _part_files(folder: Path, part: str) -> list[Path]:
    """The files of a part: the single one, or all N. SoliError names one that is missing."""
    found = sorted(folder.glob(f"{part}-*-of-*.safetensors"))
    world = int(found[0].stem.rpartition("-")[2]) if found else 1
    files = [folder / _file_name(part, rank, world) for rank in range(world)]
    for file in files:
        if not file.is_file():
            raise SoliError(f"{file} is missing; remove this checkpoint to resume from the one before")
    return files


def _write(file: Path, items: list[Any], planner: dcp.SavePlanner) -> None:
    """One file, its tensors one after the other, so that no second copy of the state is made."""
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, Any] = {}
    for item in items:
        name = _split(item.index.fqn)[1]
        if name in tensors:
            raise SoliError(f"{file}: {name} would be written in two pieces by one process, which cannot be read back")
        tensors[name] = cast(Tensor, planner.resolve_data(item))
        chunk, size = item.tensor_data.chunk, item.tensor_data.size
        if chunk.sizes != size:
            pieces[name] = [list(chunk.offsets), list(size)]
    specs = [(name, FILE_DTYPE[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    head, offsets, _ = encode_header(specs, {PIECES: json.dumps(pieces)} if pieces else {})
    with file.open("wb") as stream:
        stream.write(head)
        for name in sorted(tensors, key=offsets.__getitem__):
            stream.seek(offsets[name])
            stream.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
