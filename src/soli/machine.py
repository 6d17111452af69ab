"""What this machine has and how fast it reads: processor, kernels in use, memory, disk, GPUs, versions.

Bandwidths are measured, each in about a second. Memory: the best of several sums over a block larger than any cache, by
all of torch's threads. Disk: a file is written, pushed out of the page cache and read again; a disk that has a cache of
its own, as in many virtual machines, answers faster than it is. GB are 10^9 bytes.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from soli import __version__
from soli.kernels import dispatch
from soli.kernels.cpu import build, native

FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")
MEMORY_BLOCK = 2**28  # bytes
DISK_FILE = 2**27
PIECE = 2**23
SECONDS = 1.0
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "triton")


@dataclass(frozen=True)
class Machine:
    """A machine as `soli doctor` tells it; None for what could not be measured or is not there."""

    processor: str
    cores: int
    memory_bytes: int
    features: tuple[str, ...]
    kernels: str  # the instruction set of the C++ kernels, or "torch"
    kernels_note: str  # where they lie, or why there are none
    threads: int
    openmp: tuple[str, ...]
    memory_gb_per_second: float
    disk_gb_per_second: float | None
    disk_folder: str
    gpus: tuple[str, ...]
    versions: dict[str, str]


def inspect(disk_folder: Path | None = None) -> Machine:
    """Look at this machine and measure it; the disk in `disk_folder`, by default the one for temporary files."""
    folder = disk_folder or Path(tempfile.gettempdir())
    name, features = _processor()
    kernels, note = _kernels()
    return Machine(
        processor=name,
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        features=features,
        kernels=kernels,
        kernels_note=note,
        threads=torch.get_num_threads(),
        openmp=tuple(Path(file).name for file in build.openmp_runtimes()),
        memory_gb_per_second=memory_bandwidth(),
        disk_gb_per_second=disk_bandwidth(folder),
        disk_folder=str(folder),
        gpus=_gpus(),
        versions={"soli": __version__, "python": platform.python_version(), **_versions()},
    )


def memory_bandwidth(size: int = MEMORY_BLOCK) -> float:
    """GB per second that torch's threads read, the best of a second's tries."""
    block = torch.ones(size // 4)
    block.sum()
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        start = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best / 1e9


def disk_bandwidth(folder: Path, size: int = DISK_FILE) -> float | None:
    """GB per second of reading a file in `folder` from its beginning; None where there is no room for one."""
    try:
        if shutil.disk_usage(folder).free < 4 * size:
            return None
        with tempfile.TemporaryFile(dir=folder) as file:
            piece = os.urandom(PIECE)
            for _ in range(size // PIECE):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start, read = time.perf_counter(), 0
            while got := len(file.read(PIECE)):
                read += got
            return read / (time.perf_counter() - start) / 1e9
    except OSError:
        return None


def _processor() -> tuple[str, tuple[str, ...]]:
    """Name and those of FEATURES that it has, as Linux tells them."""
    file = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return fields.get("model name") or platform.machine(), tuple(name for name in FEATURES if name in flags)


def _kernels() -> tuple[str, str]:
    found = native.library_or_reason()
    if isinstance(found, str):
        return "torch", found
    way = dispatch.forced()
    if way in ("reference", "torch"):
        return way, "SOLI_KERNELS asks for it"
    return native.ISAS[native.chosen_isa(found.best_isa)], str(found.path)


def _gpus() -> tuple[str, ...]:
    found = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        found.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}")
    return tuple(found)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
