"""What a stated number of bytes is divided into: weights that stay, latent cache, scratch, and experts.

The bytes are what Soli allocates. Interpreter and libraries come on top: `overhead`, measured when the model is opened.
"""

import weakref
from dataclasses import dataclass, replace
from typing import Final

from soli.errors import SoliError
from soli.experts.paging_stats import PagingStats
from soli.experts.policy import Policy
from soli.experts.store import ExpertStore
from soli.experts.usage import UsageFile
from soli.machine import available_memory
from soli.quantities import scaled

MARGIN: Final = 0.1  # of the available memory, left to the system where no size is stated
MIN_MARGIN: Final = 2**29  # bytes


def default_memory() -> tuple[int, int]:
    """(bytes to use, margin that is left), of what this machine has available now, cgroup limits included."""
    available = available_memory()
    margin = max(MIN_MARGIN, int(MARGIN * available))
    return max(0, available - margin), margin


def divide_bytes(
    free: int, latent_cache: int, slot_bytes: int, experts: int, policy_bytes: int
) -> tuple[int, int]:
    """(bytes of the latent cache, slots) in the bytes that weights and scratch leave: a latent cache of up to
    `latent_cache` bytes, which takes half of them at most, and slots of `slot_bytes` each. Where there are fewer slots
    than `experts`, the counts that decide which experts stay take `policy_bytes`."""
    cache = min(latent_cache, max(0, free // 2))
    if policy_bytes and (free - cache) // slot_bytes < experts:
        return divide_bytes(free - policy_bytes, latent_cache, slot_bytes, experts, 0)
    return cache, (free - cache) // slot_bytes


def least_bytes(experts: int, slot_bytes: int) -> int:
    """For the fewest experts that must be in memory at once, and a latent cache of as much."""
    return 2 * experts * slot_bytes


@dataclass(frozen=True)
class BandwidthRates:
    """Of this machine, in bytes per second; None where it was not measured."""

    disk: float | None = None
    memory: float | None = None


@dataclass
class MemoryBudget:
    """`total` bytes for a model of which `resident` stay in memory, `resident_per_pass` of them read in each forward
    pass, and the store of its experts. `least` experts must be in memory at once: those that a token chooses in a
    layer."""

    total: int
    resident: int
    overhead: int
    least: int
    store: ExpertStore
    resident_per_pass: int = 0
    rates: BandwidthRates = BandwidthRates()
    latent_cache: int = 0
    scratch: int = 0
    usage_file: UsageFile | None = None
    _finalizer: "weakref.finalize[..., MemoryBudget] | None" = None

    def divide(self, latent_cache: int, scratch: int) -> int:
        """Give the experts what is left beside a latent cache of up to `latent_cache` bytes, which takes half of it at
        most, and `scratch`; the bytes of the latent cache. SoliError with the bytes needed where that is too little."""
        store, policy = self.store, self.store.policy.nbytes
        left = self.total - self.resident - scratch
        self.scratch = scratch
        self.latent_cache, capacity = divide_bytes(left, latent_cache, store.slot_bytes, store.sources.count, policy)
        if capacity < self.least:
            needed = self.resident + scratch + policy + least_bytes(self.least, store.slot_bytes)
            raise SoliError(
                f"{self.total:,} bytes of memory are too few for this model: weights that stay take "
                f"{self.resident:,}, scratch {scratch:,}, the {self.least} experts that a token chooses in a layer "
                f"{self.least * store.slot_bytes:,}, and the latent cache as much again: give {needed:,} or more"
            )
        if capacity < store.capacity or store.capacity < store.sources.count:
            store.resize(capacity)
            self._begin()
        return self.latent_cache

    def paging(self, steps: int, seconds: float) -> PagingStats:
        """What cache and disk did in so many forward passes, which took so long."""
        stats = self.store.paging()
        return replace(
            stats,
            bytes_used=stats.bytes_used + steps * self.resident_per_pass,
            step_seconds=seconds,
            disk_rate=self.rates.disk,
            memory_rate=self.rates.memory,
        )

    def remember(self) -> None:
        """Write which experts were used, for the next run of this model; at the end of the process, or when nobody has
        the model any more, that happens by itself."""
        if self._finalizer is not None:
            self._finalizer()

    def _begin(self) -> None:
        """Read what earlier runs used, and note what this one does."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = None
        if self.usage_file is None or self.store.holds_all:
            return
        usage = self.usage_file.read()
        if usage is not None:
            self.store.begin_with(usage)
        self._finalizer = weakref.finalize(self, _remember, self.usage_file, self.store.policy)

    def __str__(self) -> str:
        store = self.store
        return (
            f"{scaled(self.total, 'B')} of memory: {scaled(self.resident, 'B')} weights that stay, "
            f"{scaled(self.latent_cache, 'B')} latent cache, {scaled(self.scratch, 'B')} scratch, "
            f"{scaled(store.nbytes, 'B')} for {store.capacity:,} of {store.sources.count:,} experts; the others are "
            f"read from disk as they are needed. Python and its libraries take {scaled(self.overhead, 'B')} on top"
        )


def _remember(file: UsageFile, policy: Policy) -> None:
    usage = policy.usage()
    if usage is not None and usage.tokens:
        file.write(usage)
