"""Devices as their vendors state them, dense rates and not sparse, 8 in a machine. The H800's links are those of arXiv
2412.19437, 3.1 and 3.2.2: 160 GB/s to a device of the same machine, 50 GB/s to one of another. No torch."""

from dataclasses import dataclass

from soli.errors import SoliError
from soli.sections import suggest

MACHINE = 8  # devices


@dataclass(frozen=True)
class DeviceKind:
    """Peaks in TFLOP/s: `tflops` in bf16; `fp8_tflops` 0 where there is none. `bandwidth`, `link`: bytes per second."""

    name: str
    memory: float  # bytes
    tflops: float
    fp8_tflops: float
    fp32_tflops: float
    bandwidth: float  # of the memory
    neighbour_link: float  # in one direction, to a device of the same machine
    link: float  # to one of another machine


DEVICES = {
    kind.name: kind
    for kind in (
        DeviceKind("a100", 80e9, 312, 0, 19.5, 2.04e12, 300e9, 25e9),
        DeviceKind("h800", 80e9, 989, 1979, 67, 3.35e12, 160e9, 50e9),
        DeviceKind("h100", 80e9, 989, 1979, 67, 3.35e12, 450e9, 50e9),
        DeviceKind("h200", 141e9, 989, 1979, 67, 4.8e12, 450e9, 50e9),
        DeviceKind("b200", 180e9, 2250, 4500, 75, 8.0e12, 900e9, 50e9),
    )
}


def find_device(name: str) -> DeviceKind:
    """A device by name; SoliError for one that is not in the table."""
    if name not in DEVICES:
        raise SoliError(f"--device {name} is not known; {suggest(name, DEVICES)}")
    return DEVICES[name]
