"""What this machine has: processor, memory, disk speed, installed packages. No torch; GB are 10^9 bytes."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
DISK_FILE = 2**27  # bytes
BLOCK = 2**23  # bytes of one read or write
# Instruction sets that a kernel of Soli or torch uses, in Linux's names.
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")


@dataclass(frozen=True)
class Processor:
    """`features`: those of FEATURES that it has, none where the system does not list them."""

    name: str
    cores: int
    features: tuple[str, ...]


def processor() -> Processor:
    """The CPU as Linux describes it; on another system its architecture."""
    fields: dict[str, str] = {}
    for line in CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.is_file() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return Processor(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        features=tuple(name for name in FEATURES if name in flags),
    )


def memory_bytes() -> int:
    """Installed memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def disk_bandwidth(folder: Path, size: int | None = None) -> float | None:
    """GB per second of reading a file in `folder` from its beginning; None where it has no space for one.

    The file is written, pushed out of the page cache and read again. A disk with a cache of its own, as in many virtual
    machines, answers faster than it reads.
    """
    size = DISK_FILE if size is None else size
    try:
        if shutil.disk_usage(folder).free < 4 * size:
            return None
        with tempfile.TemporaryFile(dir=folder) as file:
            block = os.urandom(BLOCK)
            for _ in range(size // BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            total = 0
            while count := len(file.read(BLOCK)):
                total += count
            return total / (time.perf_counter() - start) / 1e9
    except OSError:
        return None


def package_version(package: str) -> str | None:
    """An installed package's version, without importing it; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {package: package_version(package) for package in packages}
    return {package: version for package, version in versions.items() if version is not None}
