"""How a disk is best read, measured once for each and remembered: how many reads at a time, how large, direct or
buffered.

Experts are read as the store reads them, several in flight, from a large file of the folder or one that is made. Direct
reads leave no copy in the page cache, so they are preferred unless buffered ones are much faster, and the usual
settings unless others are faster by more than a disk's speed varies. All settings read the same ranges, once more after
a first time that does not count: a cache reads experts again and again, and the host of a virtual disk may keep some.
"""

import errno
import os
import platform
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Final

from soli.errors import SoliError
from soli.experts.reading import BLOCK, THREADS, Reader, Settings, new_memory
from soli.experts.sources import Read
from soli.measured import remembered

TRIAL_BYTES: Final = 2**27  # that are read with each setting in each round
ROUNDS: Final = 3
FILE_BYTES: Final = 2**28  # of the file that is made where there is none
READ_BYTES: Final = 2**23  # of one expert, about
IN_FLIGHT: Final = 8  # experts
SINGLE_READS: Final = 24
MIN_LATENCY: Final = 5e-5  # seconds
GAIN: Final = 1.1  # by which other settings must be faster than the usual ones
BUFFERED_GAIN: Final = 1.25  # and buffered reads than direct ones


CANDIDATES: Final = (Settings(), Settings(4, 2**22), Settings(16, 2**20), Settings(16, 2**22))
BUFFERED: Final = Settings(direct=False)


@dataclass(frozen=True)
class Disk:
    """A disk as measured: bytes per second with the settings that are best for it while many reads are in flight; the
    seconds that a read which finds the disk idle takes longer than that."""

    rate: float
    idle_latency: float
    direct: bool
    date: str
    threads: int = THREADS
    block: int = BLOCK

    @property
    def settings(self) -> Settings:
        """For reading experts."""
        return Settings(self.threads, self.block, None if self.direct else False)

    def __str__(self) -> str:
        way = "direct" if self.direct else "buffered"
        reads = f"{self.threads} {way} reads of {self.block // 2**10:,} KiB at a time"
        return f"{self.rate / 1e9:.2f} GB/s with {reads} (measured {self.date})"


def measured_disk(folder: Path, renew: bool = False) -> Disk:
    """The disk that a folder is on, or would be on; measured now if it is not known. SoliError where it cannot be."""
    existing = existing_folder(folder)
    device = os.stat(existing).st_dev
    identity = f"{platform.node()} device {os.major(device)}:{os.minor(device)}"
    disk = remembered("disks", identity, Disk, lambda: _measure(existing), renew)
    assert isinstance(disk, Disk)
    return disk


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _measure(folder: Path) -> Disk:
    """With a large file that is there, else with one that is made; SoliError where neither can be."""
    sizes = {file: file.stat().st_size for file in folder.glob("*.safetensors")}
    largest = max(sizes, key=lambda file: sizes[file], default=None)
    if largest is not None and sizes[largest] >= FILE_BYTES:
        return _choose(largest)
    try:
        if shutil.disk_usage(folder).free < 4 * FILE_BYTES:
            raise OSError(errno.ENOSPC, "there is no space for a file")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".soli-probe-") as file:
            block = os.urandom(READ_BYTES)
            for _ in range(FILE_BYTES // READ_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _choose(Path(file.name))
    except OSError as error:
        if largest is not None and sizes[largest] >= READ_BYTES:
            return _choose(largest)
        raise SoliError(
            f"{folder}: its disk cannot be measured ({error.strerror}): give the rate with --disk, such as 3GB/s"
        ) from None


def _choose(file: Path) -> Disk:
    """Try every setting, and keep the best."""
    starts = _starts(file, TRIAL_BYTES // READ_BYTES)
    settings_to_try = (*CANDIDATES, BUFFERED)
    _rate(file, CANDIDATES[0], starts)
    rounds = [{settings: _rate(file, settings, starts) for settings in settings_to_try} for _ in range(ROUNDS)]
    rates = {settings: median(one[settings] for one in rounds) for settings in settings_to_try}
    usual = CANDIDATES[0]
    best = max(CANDIDATES, key=lambda settings: rates[settings])
    best = best if rates[best] > GAIN * rates[usual] else usual
    if rates[BUFFERED] > BUFFERED_GAIN * rates[best]:
        best = BUFFERED
    reader = _reader(file, best)
    try:
        slot = memoryview(new_memory(READ_BYTES))
        seconds = median(_seconds_of(reader, at, slot) for at in _starts(file, SINGLE_READS))
        latency = max(MIN_LATENCY, seconds - READ_BYTES / rates[best])
        return Disk(rates[best], latency, reader.direct, str(date.today()), best.threads, best.block)
    finally:
        reader.close()


def _rate(file: Path, settings: Settings, starts: Sequence[int]) -> float:
    """Bytes per second of reading parts of a file."""
    reader = _reader(file, settings)
    try:
        slots = [memoryview(new_memory(READ_BYTES)) for _ in range(IN_FLIGHT)]
        start = time.perf_counter()
        _read_all(reader, starts, slots)
        return len(starts) * READ_BYTES / (time.perf_counter() - start)
    finally:
        reader.close()


def _reader(file: Path, settings: Settings) -> Reader:
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Reader([file], settings)


def _starts(file: Path, count: int) -> list[int]:
    blocks = file.stat().st_size // READ_BYTES
    return [block * READ_BYTES for block in random.sample(range(blocks), min(blocks, count))]


def _read_all(reader: Reader, starts: Sequence[int], slots: Sequence[memoryview]) -> None:
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
    """Until one expert has arrived that is read alone."""
    event = threading.Event()
    start = time.perf_counter()
    reader.submit([Read(0, at, READ_BYTES, 0, READ_BYTES)], slot, lambda error: event.set())
    event.wait()
    return time.perf_counter() - start
