"""What `soli doctor` reports: the machine's probes, the kernels in use, and memory bandwidth measured with torch."""

import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from soli import __version__, machine
from soli.errors import SoliError
from soli.experts.disk import measured_disk
from soli.experts.memory_rate import memory_bandwidth
from soli.kernels import Dispatch
from soli.kernels.cpu import build, native

BUSY = 0.2  # cores; less is what any system does beside
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "triton")


@dataclass(frozen=True)
class MachineReport:
    """None for what could not be measured or is not there."""

    processor: str
    cores: int
    busy_cores: float | None  # that other processes keep busy
    memory_bytes: int
    available_bytes: int
    features: tuple[str, ...]
    kernels: str  # the instruction set of the C++ kernels, or "torch"
    kernels_note: str  # the path of their library, or why there is none
    threads: int
    openmp: tuple[str, ...]
    memory_gb_per_second: float
    disk_gb_per_second: float | None
    disk_reads: str  # what is chosen for reading experts; why there is nothing
    disk_folder: str
    gpus: tuple[str, ...]
    versions: dict[str, str]

    def lines(self) -> list[tuple[str, str]]:
        """(label, text) of each line of the table."""
        cpp = self.kernels not in ("torch", "reference")
        kernels = f"C++ for {self.kernels}, {self.kernels_note}" if cpp else f"{self.kernels}: {self.kernels_note}"
        memory = f"{self.memory_bytes / 2**30:.1f} GiB of memory, {self.available_bytes / 2**30:.1f} GiB available"
        return [
            ("processor", f"{self.processor}, {self.cores} cores, {memory}"),
            ("features", " ".join(self.features) or "none that the kernels use"),
            ("kernels", kernels),
            ("threads", f"{self.threads}, {' and '.join(self.openmp) or 'no OpenMP library'}{self._load()}"),
            ("memory", f"{self.memory_gb_per_second:.1f} GB/s read by all threads"),
            ("disk", f"{self.disk_reads}, in {self.disk_folder}"),
            ("GPU", "; ".join(self.gpus) or "none that PyTorch sees"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]

    def _load(self) -> str:
        """What other processes take, as the end of a line."""
        if self.busy_cores is None:
            return ""
        slower = "; this machine is busy: it measures and computes more slowly" if self.busy_cores >= BUSY else ""
        return f"; other processes keep {self.busy_cores:.1f} of {self.cores} cores busy{slower}"


def report_machine(disk_folder: Path | None = None) -> MachineReport:
    """Probe and measure this machine; the disk in `disk_folder`, by default the one for temporary files."""
    folder = disk_folder or Path(tempfile.gettempdir())
    processor = machine.processor()
    kernels, note = _kernels()
    rate, reads = _disk(folder)
    return MachineReport(
        processor=processor.name,
        cores=processor.cores,
        busy_cores=machine.busy_cores(),
        memory_bytes=machine.memory_bytes(),
        available_bytes=machine.available_memory(),
        features=processor.features,
        kernels=kernels,
        kernels_note=note,
        threads=torch.get_num_threads(),
        openmp=tuple(Path(file).name for file in build.openmp_runtimes()),
        memory_gb_per_second=memory_bandwidth(),
        disk_gb_per_second=rate,
        disk_reads=reads,
        disk_folder=str(folder),
        gpus=_gpus(),
        versions={
            "soli": __version__,
            "python": platform.python_version(),
            **machine.package_versions(PACKAGES),
        },
    )


def _disk(folder: Path) -> tuple[float | None, str]:
    """GB per second, measured now, and how experts are read from it; None and the reason."""
    try:
        disk = measured_disk(folder, renew=True)
    except SoliError:
        return None, "not measured: no space for a file, or not allowed"
    return disk.rate / 1e9, str(disk)


def _kernels() -> tuple[str, str]:
    library = native.library_or_reason()
    if isinstance(library, str):
        return "torch", library
    backend = Dispatch.from_environment()
    if backend.forced_backend in ("reference", "torch"):
        return backend.forced_backend, "set by SOLI_KERNELS"
    return native.ISAS[native.isa_number(backend.isa, library.best_isa)], str(library.path)


def _gpus() -> tuple[str, ...]:
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return tuple(f"{c.name}, {c.total_memory / 2**30:.0f} GiB, capability {c.major}.{c.minor}" for c in cards)
