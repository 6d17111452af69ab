"""One safetensors file: its header checked to the last byte, its tensors mapped from disk.

    8 bytes: length n, little endian | n bytes: JSON {name: {dtype, shape, data_offsets}} | data

Opening reads the header alone; data is mapped at the first access and read by the system page by page. The bytes are
never executed or unpickled. Rejected: a header that is no such JSON, a tensor whose bytes overlap another's, leave a
gap, do not match its dtype and shape or exceed the file (an incomplete download).
"""

import json
import math
import mmap
import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from torch import Tensor

from soli.errors import SoliError
from soli.input_files import decode, open_regular, parse_json
from soli.mapped_files import name_files_that_shrink
from soli.sections import LARGEST_INT

ITEM_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
TORCH_DTYPE: Final = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
}
FILE_DTYPE: Final = {dtype: name for name, dtype in TORCH_DTYPE.items()}
HEADER_LIMIT: Final = 100_000_000  # bytes; the safetensors library's own limit
MAX_DIMENSIONS: Final = 64  # torch's own limit


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The place of one tensor: bytes `start` to `end` of `file`, counted from the file's first byte."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name}"


class Shard:
    """A safetensors file, open for reading: `entries` are its tensors by name, `metadata` the rest of its header."""

    def __init__(self, file: Path) -> None:
        """Read and check the header. Raises SoliError naming the file and, where there is one, the tensor."""
        self.file = file
        self.entries, self.metadata = _read_header(file)

    def read(self, name: str) -> Tensor:
        """A tensor read into memory. SoliError where the file has become shorter."""
        entry = self.entries[name]
        return self._read(entry, entry.start, entry.end).view(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` - 1 of a tensor, likewise; nothing else is read."""
        entry = self.entries[name]
        row_bytes = (entry.end - entry.start) // max(1, entry.shape[0])
        first, last = entry.start + start * row_bytes, entry.start + stop * row_bytes
        return self._read(entry, first, last).view(stop - start, *entry.shape[1:])

    def parameter(self, name: str) -> Tensor | None:
        """A tensor mapped so that it can be written: what is written stays in this process. None where its place in the
        file is not aligned."""
        entry = self.entries[name]
        dtype = TORCH_DTYPE[entry.dtype]
        if entry.start % dtype.itemsize or entry.start == entry.end:
            return None
        name_files_that_shrink()
        first = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
        with open_regular(self.file) as stream:
            mapped = self._map(stream, entry.end - first, offset=first, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=dtype, offset=entry.start - first).view(entry.shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored, mapped and read-only: writing to it would crash the process, so copy it first."""
        entry = self.entries[name]
        data = self._bytes[entry.start : entry.end]
        if entry.start % ITEM_BYTES[entry.dtype]:
            data = data.clone()  # views need alignment, which the format does not promise
        return data.view(TORCH_DTYPE[entry.dtype]).view(entry.shape)

    def _read(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Bytes `start` to `stop` - 1 of the file as values of a tensor's dtype."""
        with open_regular(self.file) as stream:
            stream.seek(start)
            data = np.fromfile(stream, np.uint8, stop - start)
        if len(data) < stop - start:
            raise SoliError(f"{entry}: the file became shorter while it was read")
        return torch.from_numpy(data).view(TORCH_DTYPE[entry.dtype])

    @cached_property
    def _bytes(self) -> Tensor:
        name_files_that_shrink()
        with open_regular(self.file) as stream:
            mapped = self._map(stream, 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # in pages of 2 MiB where the file system can: fewer addresses to translate
            with suppress(OSError):
                mapped.madvise(mmap.MADV_HUGEPAGE)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(mapped, dtype=torch.uint8)

    def _map(self, stream: BinaryIO, length: int, **options: int) -> mmap.mmap:
        try:
            return mmap.mmap(stream.fileno(), length, **options)
        except (OSError, ValueError) as error:  # ValueError: behind the end of the file
            raise SoliError(f"{self.file}: cannot be mapped into memory ({error})") from None


def encode_header(
    specs: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """Lay out (name, dtype, shape) tensors: the file's first bytes, each tensor's first byte, and the file's length.

    Wide dtypes come first and the header is padded to 8 bytes, so that every tensor is aligned. `metadata` is what else
    the header is to say, for whoever reads `Shard.metadata`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    offsets, end = {}, 0
    for name, dtype, shape in sorted(specs, key=lambda spec: -ITEM_BYTES[spec[1]]):
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        offsets[name] = start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + start for name, start in offsets.items()}, base + end


def _read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise SoliError(f"{file}: its header does not fit in its {size} bytes: cut short, or no safetensors file")
        header = parse_json(decode(stream.read(length), f"{file}: its header"), f"{file}: its header")
    if not isinstance(header, dict):
        raise SoliError(f"{file}: its header is not a JSON object: it is damaged or no safetensors file")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SoliError(f"{file}: its header has a __metadata__ that is no JSON object of texts: it is damaged")
    entries = {name: _entry(file, name, fields, 8 + length) for name, fields in header.items()}
    _check_layout(file, entries, 8 + length, size)
    return entries, metadata


def _entry(file: Path, name: str, fields: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        if not all(type(n) is int and 0 <= n <= LARGEST_INT for n in (*shape, start, end)):
            raise ValueError("a size or an offset is no natural number")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError("no tensor has as many dimensions")
    except (TypeError, KeyError, ValueError):
        raise SoliError(f"{file}: tensor {name} has a damaged header entry") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise SoliError(f"{file}: tensor {name} has dtype {dtype!r}, which is not known")
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise SoliError(f"{file}: tensor {name} has {end - start} bytes, too many or few for {dtype} of shape {shape}")
    return TensorEntry(file, name, dtype, shape, base + start, base + end)


def _check_layout(file: Path, entries: dict[str, TensorEntry], base: int, size: int) -> None:
    """Tensors must fill the data without overlap or gap, as the format says."""
    end = base
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.end > size:
            raise SoliError(f"{entry} ends at byte {entry.end}, but the file is cut short at {size}; fetch it again")
        if entry.start != end:
            raise SoliError(f"{entry} begins at byte {entry.start} instead of {end}: the header is damaged")
        end = entry.end
    if end != size:
        raise SoliError(f"{file}: holds {size - end} bytes after its last tensor: it is damaged")
