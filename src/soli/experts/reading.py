"""Reads ranges of files into memory, many at a time, by threads: direct I/O where the file system has it.

Direct reads go from the disk to the cache of experts without a copy in the page cache, which would take memory twice.
A file system without direct I/O is read through the page cache, after one line that says so. The two are never mixed on
one file.
"""

import logging
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from soli.errors import SoliError
from soli.experts.sources import Read

log = logging.getLogger(__name__)

OnArrival = Callable[[Exception | None], None]

THREADS: Final = 8
SECTOR: Final = 512  # bytes
LATER_AT_ONCE: Final = 2  # blocks
BLOCK: Final = 2**21  # bytes of one read at most: so a single expert keeps several threads busy


@dataclass
class ReadStats:
    """Bytes and seconds of reads, counted while any is in flight."""

    bytes: int = 0
    reads: int = 0
    busy_seconds: float = 0.0


class Settings(NamedTuple):
    """How files are read: up to `threads` reads at a time, of up to `block` bytes. `direct` None: direct I/O where it
    works; False: through the page cache."""

    threads: int = THREADS
    block: int = BLOCK
    direct: bool | None = None


USUAL: Final = Settings()


class Pending:
    """The reads of one expert into its slot. `on_arrival(error)` is called once, by the thread of the last."""

    def __init__(self, pieces: Sequence[Read], slot: memoryview, on_arrival: OnArrival) -> None:
        self.pieces, self.slot = pieces, slot
        self.started = False
        self._left = len(pieces)
        self._on_arrival = on_arrival
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def finish(self, error: Exception | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            last = self._left == 0
        if last:
            self._on_arrival(self._error)


class Reader:
    """Opens `files` and reads from them.

    What is needed is read first. What may be needed is read while nothing else is, LATER_AT_ONCE blocks at a time, so
    that little is in the way of what is needed next. SoliError naming the file where it cannot be opened; errors of
    reads go to those who submitted them.
    """

    def __init__(self, files: Sequence[Path], settings: Settings = USUAL) -> None:
        self._block = settings.block
        self._files = [_File(path, settings.direct is not False) for path in files]
        buffered = next((file.path for file in self._files if not file.direct), None)
        if buffered is not None and settings.direct is None:
            log.warning("%s: its file system has no direct I/O, so experts are read through the page cache", buffered)
        self.stats = ReadStats()
        self._ready = threading.Condition()
        self._needed: deque[tuple[Read, Pending]] = deque()
        self._later: deque[tuple[Read, Pending]] = deque()
        self._in_flight = {True: 0, False: 0}  # pieces, by whether they are needed
        self._busy_since = 0.0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name="expert reads") for _ in range(settings.threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def direct(self) -> bool:
        """Whether every file is read past the page cache."""
        return all(file.direct for file in self._files)

    def submit(
        self, reads: Sequence[Read], slot: memoryview, on_arrival: OnArrival, needed: bool = True
    ) -> Pending:
        """Read into a slot, whose address is aligned; `on_arrival` gets None or the error, on one of the threads."""
        pieces = [piece for read in reads for piece in split(read, self._block)]
        pending = Pending(pieces, slot, on_arrival)
        with self._ready:
            (self._needed if needed else self._later).extend((piece, pending) for piece in pieces)
            self._ready.notify_all()
        return pending

    def promote(self, pending: Pending) -> None:
        """What may be needed is needed."""
        with self._ready:
            self._needed.extend(item for item in self._later if item[1] is pending)
            self._remove_later(pending)
            self._ready.notify_all()

    def cancel(self, pending: Pending) -> bool:
        """Drop what is not needed; whether nothing of it had been read. Otherwise it arrives."""
        with self._ready:
            if not pending.started:
                self._remove_later(pending)
            return not pending.started

    def close(self) -> None:
        """Ends the threads after what was submitted, and closes the files."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()
        for file in self._files:
            os.close(file.descriptor)

    def _remove_later(self, pending: Pending) -> None:
        self._later = deque(item for item in self._later if item[1] is not pending)

    def _work(self) -> None:
        while (item := self._take()) is not None:
            read, pending, needed = item
            error: Exception | None = None
            try:
                target = pending.slot[read.offset : read.offset + read.length]
                self._files[read.file].read(target, read.start, read.needed)
            except Exception as failure:
                error = failure
            with self._ready:
                self._count(needed, -1)
                self.stats.bytes += read.length
                self.stats.reads += 1
                if not needed or not self._in_flight[True]:
                    self._ready.notify_all()
            pending.finish(error)

    def _take(self) -> tuple[Read, Pending, bool] | None:
        """The next piece, and whether it is needed; None at the end."""
        with self._ready:
            while True:
                idle = not self._in_flight[True] and self._in_flight[False] < LATER_AT_ONCE
                needed = bool(self._needed)
                if needed or (self._later and idle):
                    read, pending = (self._needed if needed else self._later).popleft()
                    pending.started = True
                    self._count(needed, 1)
                    return read, pending, needed
                if self._closed and not self._later:
                    return None
                self._ready.wait()

    def _count(self, needed: bool, change: int) -> None:
        """Follow reads in flight: the time in which there is at least one is what the disk was busy."""
        now = time.perf_counter()
        if sum(self._in_flight.values()):
            self.stats.busy_seconds += now - self._busy_since
        self._busy_since = now
        self._in_flight[needed] += change


class _File:
    """An open file that must stay as it is."""

    def __init__(self, path: Path, direct: bool) -> None:
        self.path = path
        self.direct = False
        try:
            if direct and hasattr(os, "O_DIRECT"):
                self.descriptor = self._open_direct()
            if not self.direct:
                self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._identity = self._stat()
        except OSError as error:
            raise SoliError(f"{path}: cannot be read ({error.strerror})") from None

    def read(self, target: memoryview, start: int, needed: int) -> None:
        """Fill `target` from byte `start` on; of its end, behind `needed` bytes, the file may have none."""
        end = 0  # of what has been read
        while end < needed:
            try:
                count = os.preadv(self.descriptor, [target[end:]], start + end)
            except OSError as error:
                raise SoliError(f"{self.path}: cannot be read at byte {start + end} ({error.strerror})") from None
            if count == 0:
                raise SoliError(f"{self.path}: became shorter while it was in use: restore it")
            end += count
            if end < needed and self.direct:
                end -= end % SECTOR  # a direct read continues at a block's first byte
        if self._stat() != self._identity:
            raise SoliError(f"{self.path}: changed while it was in use: start again")

    def _open_direct(self) -> int:
        """Open for direct I/O, and try it: some file systems reject it only when reading."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            return -1
        try:
            os.preadv(descriptor, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
        except OSError:
            os.close(descriptor)
            return -1
        self.direct = True
        return descriptor

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns


def new_memory(size: int) -> mmap.mmap:
    """Zeros to read into, from the first byte of a page on. Private, in huge pages where the system has them: pages
    that could be shared with another process are small, and direct I/O pins them one by one."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def split(read: Read, block: int) -> list[Read]:
    """The same bytes in reads of up to `block` bytes, a multiple of the alignment."""
    return [
        Read(
            read.file,
            read.start + at,
            min(block, read.length - at),
            read.offset + at,
            max(0, min(block, read.needed - at)),
        )
        for at in range(0, read.length, block)
    ]
