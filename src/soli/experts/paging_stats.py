"""What a cache of experts and its disk did: counts that only grow, and what they say about a span of time."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from soli.quantities import scaled


@dataclass(frozen=True)
class PagingStats:
    """Since a store was made, or in a span of time (`since`). Experts: `slots`, `hits`, `misses`.

    `bytes_read` from disk, also ahead and in vain, but not before the first request; `read_seconds`, in which at least
    one read was in flight. `bytes_used`: of the weights that forward passes read from memory, `step_seconds` that these
    took, `waited_seconds` of them held up by reading. `disk_rate`, `memory_rate`: bytes per second as measured of this
    machine; None where it was not.
    """

    slots: int
    hits: int
    misses: int
    bytes_read: int
    read_seconds: float
    bytes_used: int = 0
    step_seconds: float = 0.0
    waited_seconds: float = 0.0
    disk_rate: float | None = None
    memory_rate: float | None = None

    @property
    def disk_share(self) -> float | None:
        """Of the disk's bandwidth, while steps ran."""
        return _share(self.bytes_read, self.step_seconds, self.disk_rate)

    @property
    def memory_share(self) -> float | None:
        """Of the memory's bandwidth, while steps ran."""
        return _share(self.bytes_used, self.step_seconds, self.memory_rate)

    def since(self, earlier: "PagingStats") -> "PagingStats":
        """What was added after `earlier`."""
        counts = ("hits", "misses", "bytes_read", "read_seconds", "bytes_used", "step_seconds", "waited_seconds")
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return PagingStats(**values | {name: values[name] - getattr(earlier, name) for name in counts})

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"disk_share": self.disk_share, "memory_share": self.memory_share}

    def summary(self, tokens: int) -> str:
        """One line, of so many tokens."""
        uses = self.hits + self.misses
        line = f"{self.hits / max(1, uses):.1%} of {uses:,} experts were in memory"
        if tokens and self.bytes_read:
            line += f", {scaled(self.bytes_read / tokens, 'B')} read per token"
        if self.read_seconds > 0:
            line += f" at {scaled(self.bytes_read / self.read_seconds, 'B')}/s"
        if tokens and self.waited_seconds:
            line += f", {1e3 * self.waited_seconds / tokens:,.1f} ms waited per token"
        shares = [
            f"{share:.0%} of the {name}'s bandwidth"
            for name, share in (("disk", self.disk_share), ("memory", self.memory_share))
            if share is not None
        ]
        return "; ".join([line, *([" and ".join(shares)] if shares else [])])


def _share(size: int, seconds: float, rate: float | None) -> float | None:
    return size / seconds / rate if rate and seconds > 0 else None


@dataclass
class StoreStats:
    """`hits` and `misses`: experts that a layer's tokens chose, each once per forward pass, and the bytes of all of
    them. `waited_seconds`: that layers were held up by reading."""

    hits: int = 0
    misses: int = 0
    bytes_used: int = 0
    evictions: int = 0
    waited_seconds: float = 0.0
