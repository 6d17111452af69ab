"""The rates of this machine that a plan needs, measured in seconds and remembered in the cache folder.

The kernels are timed as they are used: a layer's experts in each format, with one token (how fast weights are read) and
with many (how fast products are computed). The disk is read as the expert store reads it, past the page cache where the
file system allows that, in the folder where the model is or would be. What is remembered belongs to a processor, its
memory, the kernels, the number of threads and, for disks, the device; `renew` measures again.
"""

import errno
import json
import logging
import mmap
import os
import platform
import random
import shutil
import tempfile
import threading
import time
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from soli import __version__, machine
from soli.atomic_file import replace_file
from soli.errors import SoliError
from soli.experts.reading import Reader
from soli.experts.sources import ALIGNMENT, Read
from soli.formats.quantized import CODECS, QuantizedWeight
from soli.input_files import read_object
from soli.kernels import QuantizedExperts, default_backend
from soli.kernels.cpu import native
from soli.kernels.cpu.build import cache_folder
from soli.plan.inference import MachineRates
from soli.plan.machine_report import memory_bandwidth

log = logging.getLogger(__name__)

FILE: Final = "machine.json"
FORMATS: Final = ("bf16", "fp8", "int8", "int4")
WIDTHS: Final = (2048, 1408)  # of the timed experts: D, F
BLOCK_BYTES: Final = 200_000_000  # of all experts: larger than the caches of most processors
MANY_TOKENS: Final = 48  # of each expert, as in a prompt of 512 tokens with 6 of 64 experts
ROUNDS: Final = 5  # of which the median counts
DISK_BYTES: Final = 2**28  # that are read, and the size of the file that is made where there is none
READ_BYTES: Final = 2**23  # of one expert, about
IN_FLIGHT: Final = 8  # experts
SMALL_READS: Final = 48


@dataclass(frozen=True)
class Compute:
    """Of a processor; rates per second, by format of the weights."""

    memory_rate: float
    weight_rates: dict[str, float]
    flop_rates: dict[str, float]
    date: str

    def rates(self, disk_rate: float) -> MachineRates:
        """With a disk that reads so many bytes per second."""
        return MachineRates(self.memory_rate, disk_rate, self.weight_rates, self.flop_rates)


@dataclass(frozen=True)
class Disk:
    """Of a folder; `direct`: past the page cache."""

    rate: float
    latency: float
    direct: bool
    date: str


def measured_compute(renew: bool = False) -> Compute:
    """Of this processor with torch's number of threads."""
    return _remembered("compute", _identity(), Compute, _measure_compute, renew)


def measured_disk(folder: Path, renew: bool = False) -> Disk:
    """Of the disk that a folder is on, or would be on."""
    existing = existing_folder(folder)
    device = os.stat(existing).st_dev
    identity = f"{platform.node()} device {os.major(device)}:{os.minor(device)}"
    return _remembered("disks", identity, Disk, lambda: _measure_disk(existing), renew)


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _identity() -> str:
    processor = machine.processor()
    library = native.library_or_reason()
    kernels = "torch" if isinstance(library, str) else f"kernels {library.path.parent.name}"
    memory = f"{machine.memory_bytes() / 2**30:.0f} GiB"
    threads = f"{torch.get_num_threads()} threads"
    return f"{processor.name}, {processor.cores} cores, {threads}, {memory}, {kernels}, soli {__version__}"


def _remembered(kind: str, identity: str, record: type, measure: Callable[[], Any], renew: bool) -> Any:
    """A record of the cache's file, or a new one, which is written there."""
    path = cache_folder() / FILE
    records = _read_records(path)
    known = records.get(kind, {}).get(identity)
    if known is not None and not renew:
        try:
            return record(**known)
        except TypeError:
            log.info("%s: has an old record, so it is measured again", path)
    measured = measure()
    records.setdefault(kind, {})[identity] = asdict(measured)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(records, indent=1))
    except (SoliError, OSError) as error:
        log.warning("what was measured is not remembered: %s", error)
    return measured


def _read_records(path: Path) -> dict[str, dict[str, Any]]:
    """By kind and identity; none where the file is damaged."""
    try:
        records = read_object(path) if path.exists() else {}
    except SoliError as error:
        log.warning("%s; measured again", error)
        return {}
    return {kind: table for kind, table in records.items() if isinstance(table, dict)}


def _measure_compute() -> Compute:
    weight_rates: dict[str, float] = {}
    flop_rates: dict[str, float] = {}
    for format in FORMATS:
        experts = _random_experts(format)
        size = sum(weight.nbytes for part in (experts.gates, experts.ups, experts.downs) for weight in part)
        weight_rates[format] = size / _experts_seconds(experts, 1)
        D, F = WIDTHS
        operations = 6 * D * F * len(experts.downs) * MANY_TOKENS
        flop_rates[format] = operations / _experts_seconds(experts, MANY_TOKENS)
    weight_rates["fp32"] = weight_rates["bf16"]
    flop_rates["fp32"] = flop_rates["bf16"] / 2
    return Compute(1e9 * memory_bandwidth(), weight_rates, flop_rates, str(date.today()))


def _random_experts(format: str) -> QuantizedExperts:
    D, F = WIDTHS
    gate, up, down = (_random_weight(format, shape) for shape in ((F, D), (F, D), (D, F)))
    count = max(2, BLOCK_BYTES // (gate.nbytes + up.nbytes + down.nbytes))
    gates, ups, downs = (tuple(_copy(weight) for _ in range(count)) for weight in (gate, up, down))
    return QuantizedExperts(gates, ups, downs)


def _random_weight(format: str, shape: tuple[int, int]) -> QuantizedWeight:
    codec = CODECS[format]
    generator = torch.Generator().manual_seed(0)
    group = max(group for group in codec.groups if group == 0 or shape[1] % group == 0)
    return codec.quantize(torch.randn(shape, generator=generator) / 64, group)


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    scale = None if weight.scale is None else weight.scale.clone()
    return QuantizedWeight(weight.format, weight.values.clone(), scale, weight.shape, weight.group)


def _experts_seconds(experts: QuantizedExperts, tokens: int) -> float:
    """Of a call in which every token chose every expert."""
    E = len(experts.downs)
    ids_TK = torch.arange(E).repeat(tokens, 1)
    weights_TK = torch.full((tokens, E), 1 / E)
    x_TD = torch.ones(tokens, WIDTHS[0], dtype=torch.bfloat16)
    backend = default_backend()

    def call() -> object:
        with torch.inference_mode():
            return backend.quantized_experts(x_TD, ids_TK, weights_TK, experts)

    call()
    return median(timeit.timeit(call, number=1) for _ in range(ROUNDS))


def _measure_disk(folder: Path) -> Disk:
    """Of a large file that is there, else of one that is made; SoliError where neither can be."""
    sizes = {file: file.stat().st_size for file in folder.glob("*.safetensors")}
    largest = max(sizes, key=lambda file: sizes[file], default=None)
    if largest is not None and sizes[largest] >= DISK_BYTES:
        return _read_disk(largest)
    try:
        if shutil.disk_usage(folder).free < 4 * DISK_BYTES:
            raise OSError(errno.ENOSPC, "there is no space for a file")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".soli-probe-") as file:
            block = os.urandom(READ_BYTES)
            for _ in range(DISK_BYTES // READ_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _read_disk(Path(file.name))
    except OSError as error:
        if largest is not None and sizes[largest] >= READ_BYTES:
            return _read_disk(largest)
        raise SoliError(
            f"{folder}: its disk cannot be measured ({error.strerror}): give the rate with --disk, such as 3GB/s"
        ) from None


def _read_disk(file: Path) -> Disk:
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader = Reader([file], direct=None)
    try:
        blocks = file.stat().st_size // READ_BYTES
        count = min(blocks, DISK_BYTES // READ_BYTES)
        chosen = random.Random(0).sample(range(blocks), count)
        starts = [block * READ_BYTES for block in chosen]
        slots = [memoryview(mmap.mmap(-1, READ_BYTES)) for _ in range(IN_FLIGHT)]  # of whole pages, as slots are
        start = time.perf_counter()
        _read_all(reader, starts, slots)
        rate = count * READ_BYTES / (time.perf_counter() - start)
        latency = median(_seconds_of(reader, start, slots[0]) for start in starts[:SMALL_READS])
        return Disk(rate, latency, reader.direct, str(date.today()))
    finally:
        reader.close()


def _read_all(reader: Reader, starts: list[int], slots: list[memoryview]) -> None:
    """Several reads in flight, as of the misses of a layer."""
    free = threading.Semaphore(len(slots))
    errors: list[Exception] = []

    def arrived(error: Exception | None) -> None:
        if error is not None:
            errors.append(error)
        free.release()

    for number, at in enumerate(starts):
        free.acquire()
        reader.submit([Read(0, at, READ_BYTES, 0, READ_BYTES)], slots[number % len(slots)], arrived)
    for _ in slots:
        free.acquire()
    if errors:
        raise errors[0]


def _seconds_of(reader: Reader, at: int, slot: memoryview) -> float:
    """Until one small read has arrived."""
    event = threading.Event()
    start = time.perf_counter()
    reader.submit([Read(0, at + READ_BYTES // 2, ALIGNMENT, 0, ALIGNMENT)], slot, lambda error: event.set())
    event.wait()
    return time.perf_counter() - start
