"""A folder whose experts are read from disk one at a time: each in one piece, on whole pages, with a checksum.

A pack is a safetensors folder like any other, one file per layer. What differs is the order: weights and scales of an
expert follow each other, the first at a multiple of PAGE bytes of the file; a tensor `padding` fills its last page.
`__metadata__` has `soli_pack`, the version, and `soli_checksums`, the CRC-32 of each expert's bytes in the file's order
of experts, eight hexadecimal digits each.

Writing can be interrupted and continues with the same command: a file that is complete has its final name.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import torch
from torch import Tensor

from soli.atomic_file import check_space, remove, replace_file
from soli.checkpoint.name_map import Slot
from soli.checkpoint.reader import INDEX, SINGLE, Checkpoint
from soli.checkpoint.shard import ITEM_BYTES
from soli.checkpoint.side_files import SideFiles
from soli.checkpoint.writer import ProgressCallback, Spec, write_json, write_side_files
from soli.checksum import crc32
from soli.config import ModelConfig
from soli.errors import SoliError
from soli.input_files import read_object_if_present

PAGE: Final = 4096
VERSION: Final = "1"
PADDING: Final = "padding"  # model.layers.3.mlp.experts.7.padding
VERSION_KEY: Final = "soli_pack"
CHECKSUMS_KEY: Final = "soli_checksums"
SOURCE: Final = "source.json"  # in a folder that is being written
LOCK: Final = "lock"
DIGITS: Final = 8


class Layout(Protocol):
    """What the tensors of a slot are in the files: a writer's Target, or tensors as they are stored."""

    def specs(self, slot: Slot) -> list[Spec]: ...
    def bytes_of(self, slot: Slot) -> int: ...
    def config(self, config: ModelConfig) -> dict[str, Any]: ...


def write_pack(
    folder: Path,
    config: ModelConfig,
    slots: Sequence[Slot],
    target: Layout,
    fetch: Callable[[Slot], Sequence[Tensor]],
    signature: str,
    side_files: SideFiles,
    progress: ProgressCallback,
) -> int:
    """Write slots of a model as a pack, each with the tensors that `fetch` returns, those of `target.specs`; the bytes
    of all tensors. Memory: one tensor.

    `signature` says from what: files of an interrupted run with the same are kept. SoliError where the folder is not
    empty, the disk lacks space or writing fails; `folder` is complete or not there.
    """
    shards = _shards(slots)
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    total = sum(map(target.bytes_of, slots))
    with _partial_folder(folder, signature) as partial:
        plans = [_Plan(shard, target) for shard in shards]
        missing = [plan for name, plan in zip(names, plans, strict=True) if not (partial / name).exists()]
        check_space(folder, partial, sum(plan.size for plan in missing), "bytes more")
        written = 0
        for name, plan in zip(names, plans, strict=True):
            if not (partial / name).exists():
                for size in _write_shard(partial / name, plan, fetch):
                    progress(written + size, total)
            written += sum(map(target.bytes_of, plan.slots))
            progress(written, total)
        if len(names) > 1:
            weight_map = {spec: name for name, plan in zip(names, plans, strict=True) for spec in plan.offsets}
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_side_files(partial, side_files)
        write_json(partial / "config.json", target.config(config))
    return total


def checkpoint_signature(checkpoint: Checkpoint, target: str) -> str:
    """What a pack depends on: files of the source by name, size and time, its configuration, and how it is written."""
    files = {entry.file for entry in checkpoint.entries.values()} | {checkpoint.folder / "config.json"}
    states = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    content = json.dumps([VERSION, target, states, len(checkpoint.slots)])
    return hashlib.sha256(content.encode()).hexdigest()


def checksums(metadata: Mapping[str, Any], file: Path) -> list[int] | None:
    """CRC-32 of each expert of a file, in its order; None for a file that is no pack. SoliError for one of another
    version, or damaged."""
    version = metadata.get(VERSION_KEY)
    if version is None:
        return None
    if version != VERSION:
        raise SoliError(f"{file}: is a pack of version {version!s:.20}, and this Soli reads {VERSION}: pack it again")
    digits = metadata.get(CHECKSUMS_KEY)
    if not isinstance(digits, str) or not re.fullmatch(rf"(?:[0-9a-f]{{{DIGITS}}})*", digits):
        raise SoliError(f"{file}: its {CHECKSUMS_KEY} are damaged: pack it again")
    return [int(digits[at : at + DIGITS], 16) for at in range(0, len(digits), DIGITS)]


def _shards(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Slots by layer, those outside of layers first."""
    shards: dict[int | None, list[Slot]] = {None: []}
    for slot in slots:
        shards.setdefault(slot.layer, []).append(slot)
    return [shard for shard in shards.values() if shard]


class _Plan:
    """Where each tensor of a shard goes: `offsets` from the file's first byte, `experts` the bytes that are read
    together, first and length, from the first byte of data."""

    def __init__(self, shard: Sequence[Slot], target: Layout) -> None:
        self.slots, self.target = shard, target
        self.experts: list[tuple[int, int]] = []
        groups: dict[int | None, list[Slot]] = {}
        for slot in shard:
            groups.setdefault(slot.expert, []).append(slot)
        header: dict[str, Any] = {}
        end = 0
        for expert, group in groups.items():
            if expert is not None:
                self._pad(header, group[0], end)
                end = _pages(end)
            start = end
            specs = [spec for slot in group for spec in target.specs(slot)]
            for name, dtype, shape in sorted(specs, key=lambda spec: -ITEM_BYTES[spec[1]]):
                size = prod(shape) * ITEM_BYTES[dtype]
                header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
                end += size
            if expert is not None:
                self.experts.append((start, end - start))
        self._header = header
        self._base = len(self.head([0] * len(self.experts)))
        self.offsets = {name: self._base + entry["data_offsets"][0] for name, entry in header.items()}
        self.size = self._base + end

    def head(self, crcs: Sequence[int]) -> bytes:
        """The file's first bytes, a whole number of pages."""
        digits = "".join(f"{crc:0{DIGITS}x}" for crc in crcs)
        metadata = {"format": "pt", VERSION_KEY: VERSION, CHECKSUMS_KEY: digits}
        text = json.dumps({"__metadata__": metadata} | self._header, separators=(",", ":")).encode()
        text += b" " * (_pages(8 + len(text)) - 8 - len(text))
        return len(text).to_bytes(8, "little") + text

    def crcs(self, stream: BinaryIO) -> list[int]:
        """Of the experts, read from a file whose tensors are written."""
        values = []
        for start, length in self.experts:
            stream.seek(self._base + start)
            values.append(crc32(stream.read(length)))
        return values

    def _pad(self, header: dict[str, Any], slot: Slot, end: int) -> None:
        """Fill the page before an expert's first, with a tensor that takes the expert's name."""
        size = _pages(end) - end
        if size:
            name = slot.name.rsplit(".", 2)[0] + f".{PADDING}"
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}


def _write_shard(file: Path, plan: _Plan, fetch: Callable[[Slot], Sequence[Tensor]]) -> Iterator[int]:
    """Write one file, yielding the bytes that are written; it gets its name when it is complete."""
    draft = file.with_suffix(".draft")
    written = 0
    with draft.open("w+b") as stream:
        stream.truncate(plan.size)
        for slot in plan.slots:
            for (name, _, _), data in zip(plan.target.specs(slot), fetch(slot), strict=True):
                stream.seek(plan.offsets[name])
                stream.write(data.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            written += plan.target.bytes_of(slot)
            yield written
        head = plan.head(plan.crcs(stream))
        stream.seek(0)
        stream.write(head)
        stream.flush()
        os.fsync(stream.fileno())
    draft.rename(file)


@contextmanager
def _partial_folder(folder: Path, signature: str) -> Iterator[Path]:
    """A hidden folder to fill, renamed to `folder` on success. On failure it stays, for the next run of the same."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise SoliError(f"{folder}: is there already and not empty; choose a new folder")
    partial = folder.absolute().parent / f".{folder.absolute().name}.pack"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            if read_object_if_present(partial / SOURCE).get("signature") != signature:
                for path in [*partial.iterdir()]:
                    if path.name != LOCK:
                        remove(path)
                replace_file(partial / SOURCE, json.dumps({"signature": signature}))
            yield partial
            for name in (SOURCE, LOCK):
                remove(partial / name)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise SoliError(f"{folder}: cannot be written ({reason}); run the same command again") from None


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """One process writes a pack."""
    with (partial / LOCK).open("wb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SoliError(f"{partial}: another process is writing this pack: wait for its end") from None
        yield


def _pages(size: int) -> int:
    """`size` rounded up to whole pages."""
    return (size + PAGE - 1) // PAGE * PAGE

