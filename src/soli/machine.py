"""What this machine has: processor, memory, installed packages. No torch; GB are 10^9 bytes."""

import os
import platform
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
CPU_TIMES = Path("/proc/stat")
BUSY_SECONDS = 0.3  # over which a machine's load is measured
MEMORY_INFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
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
    """Memory that this process may use: what is installed, or less where a cgroup limits it."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([installed, *(limit for limit, _ in _cgroup_limits())])


def available_memory(processes: int = 1) -> int:
    """Bytes that this process can still take: what the system has available and what cgroups and `ulimit -v` leave of
    their limits. Page cache counts as available, for it is dropped when memory is needed. Of so many `processes`, all
    of which take as much: each."""
    left = [(limit - used) // processes for limit, used in _cgroup_limits()]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
        left.append(limit - int(pages) * os.sysconf("SC_PAGE_SIZE"))
    system = _fields(MEMORY_INFO).get("MemAvailable:")
    left.append((memory_bytes() if system is None else system * 1024) // processes)
    return max(0, min(left))


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes used without page cache) of this process's memory cgroup and of those around it, version 1 or 2."""
    for folder in _cgroup_folders():
        stat = _fields(folder / "memory.stat")
        cached = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file"))
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _number(folder / name)
            if limit is not None:
                yield limit, max(0, used - cached)


def _cgroup_folders() -> Iterator[Path]:
    lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines() if OWN_CGROUPS.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        roots = [CGROUPS, CGROUPS / "unified"] if not controllers else []  # version 2, alone or beside version 1
        roots += [CGROUPS / "memory"] if "memory" in controllers.split(",") else []
        parts = [part for part in path.split("/") if part not in ("", "..")]  # .. leads out of the namespace
        for root in roots:
            yield from (root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no such file, or "max" in it."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _fields(file: Path) -> dict[str, int]:
    """name -> number of a file with a name and a number in each line; empty where there is none."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines)
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def busy_cores(seconds: float = BUSY_SECONDS) -> float | None:
    """How many cores other processes keep busy, over so many seconds; None where the system does not count that.

    Time that a virtual machine's host takes away counts, time in which a core waits for a disk does not.
    """
    try:
        before = _seconds_of_others()
        start = time.monotonic()
        time.sleep(seconds)
        others = _seconds_of_others() - before
    except (OSError, ValueError):
        return None
    return max(0.0, others / (time.monotonic() - start))


def _seconds_of_others() -> float:
    """Seconds that cores have computed since the system started, but for this process."""
    ticks = CPU_TIMES.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, ticks[:8])
    own = sum(os.times()[:4])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own


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
