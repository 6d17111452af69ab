"""How much of a shared machine other processes took during a measurement, and repeating it when that was too much.

Busy and stolen time of all processors come from /proc/stat; the time of this process and its descendants, ended ones
included, from /proc/PID/stat. The difference is what other processes took, as a share of all processors; time stolen by
a hypervisor counts too. Without /proc the share is None and nothing is repeated.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")  # clock ticks per second
LIMIT, TRIES, PATIENCE = 0.05, 3, 30.0  # share of others, measurements at most, seconds of waiting for quiet


@dataclass(frozen=True)
class Measurement:
    """A measured value, and the share of the machine that other processes took meanwhile."""

    value: Any
    others: float | None


def busy_seconds() -> float | None:
    """Seconds that all processors together have worked since the start, stolen ones included."""
    if not (PROC / "stat").exists():
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, (PROC / "stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + soft + steal) / TICKS


def own_seconds() -> float:
    """Seconds of processor time that this process and those below it have used, ended ones included."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended just now
            continue
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = sum(map(int, fields[11:15])) / TICKS
    own = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(used[pid] for pid in own if pid in used)


def measure(run: Callable[[], Any]) -> Measurement:
    """One run, with the share that other processes took."""
    before, own, start = busy_seconds(), own_seconds(), time.perf_counter()
    value = run()
    seconds, after = time.perf_counter() - start, busy_seconds()
    if before is None or after is None:
        return Measurement(value, None)
    others = (after - before) - (own_seconds() - own)
    return Measurement(value, max(0.0, others / (seconds * (os.cpu_count() or 1))))


def measure_quietly(run: Callable[[], Any], limit: float = LIMIT) -> Measurement:
    """The first of TRIES runs in which other processes took no more than `limit`, else the least disturbed."""
    tries: list[Measurement] = []
    while len(tries) < TRIES:
        tries.append(measure(run))
        if tries[-1].others is None or tries[-1].others <= limit:
            return tries[-1]
        if len(tries) < TRIES:
            wait_for_quiet(limit)
    return min(tries, key=lambda measurement: measurement.others or 0.0)


def wait_for_quiet(limit: float, patience: float = PATIENCE) -> None:
    """Until other processes take no more than `limit` for a second, for at most `patience` seconds."""
    until = time.perf_counter() + patience
    while time.perf_counter() < until and (measure(lambda: time.sleep(1.0) or 0.0).others or 0.0) > limit:
        pass


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, limit: float = LIMIT
) -> dict[str, list[Measurement]]:
    """What each contender returned in each round: all take their turn in every round, in an order drawn anew.

    Warming up is up to the caller.
    """
    measurements: dict[str, list[Measurement]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            measurements[name].append(measure_quietly(contenders[name], limit))
        record.progress(f"round {number + 1} of {rounds}")
    return measurements


def values(measurements: Sequence[Measurement]) -> list[Any]:
    return [measurement.value for measurement in measurements]


def most(measurements: Sequence[Measurement]) -> float | None:
    """The largest share that other processes took."""
    shares = [measurement.others for measurement in measurements if measurement.others is not None]
    return max(shares, default=None)
