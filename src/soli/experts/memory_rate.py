"""How fast this machine's memory is read, measured in a second for each processor and remembered."""

import platform
import time
import timeit
from dataclasses import dataclass
from datetime import date
from typing import Final

import torch

from soli import machine
from soli.measured import remembered

MEMORY_BLOCK: Final = 2**28  # bytes, larger than any cache
SECONDS: Final = 1.0


@dataclass(frozen=True)
class Memory:
    """`rate`: bytes per second that torch's threads read."""

    rate: float
    date: str


def measured_memory() -> Memory:
    """Of this machine, with torch's number of threads; measured now if it is not known."""
    identity = f"{platform.node()}, {machine.processor().name}, {torch.get_num_threads()} threads"
    memory = remembered("memory", identity, Memory, _measure, renew=False)
    assert isinstance(memory, Memory)
    return memory


def _measure() -> Memory:
    return Memory(1e9 * memory_bandwidth(), str(date.today()))


def memory_bandwidth(size: int = MEMORY_BLOCK) -> float:
    """GB per second that torch's threads read: the best sum over a block of `size` bytes within SECONDS."""
    block = torch.ones(size // 4)
    best = timeit.timeit(block.sum, number=1)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        best = min(best, timeit.timeit(block.sum, number=1))
    return block.nbytes / best / 1e9
