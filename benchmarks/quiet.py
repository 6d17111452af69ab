"""How much of a shared machine others took while something was measured, and measuring again when it was too much.

Busy and stolen time of all processors come from /proc/stat; what this process and all that it started used, the dead
included, from /proc/PID/stat. The difference is what others took, as a share of all processors; a hypervisor's theft
counts as others. Without /proc the share is None and nothing is measured again.
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
class Taken:
    """A measured value, and the share of the machine that others had meanwhile."""

    value: Any
    others: float | None


def busy() -> float | None:
    """Seconds that all processors together have worked since the start, stolen ones included."""
    if not (PROC / "stat").exists():
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, (PROC / "stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + soft + steal) / TICKS


def ours() -> float:
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


def watched(run: Callable[[], Any]) -> Taken:
    """Run and say how much others took."""
    before, own, start = busy(), ours(), time.perf_counter()
    value = run()
    seconds, after = time.perf_counter() - start, busy()
    if before is None or after is None:
        return Taken(value, None)
    others = (after - before) - (ours() - own)
    return Taken(value, max(0.0, others / (seconds * (os.cpu_count() or 1))))


def patiently(run: Callable[[], Any], limit: float = LIMIT) -> Taken:
    """The first of TRIES runs in which others took no more than `limit`, else the least disturbed of them."""
    tries: list[Taken] = []
    while len(tries) < TRIES:
        tries.append(watched(run))
        if tries[-1].others is None or tries[-1].others <= limit:
            return tries[-1]
        if len(tries) < TRIES:
            wait_for_quiet(limit)
    return min(tries, key=lambda taken: taken.others or 0.0)


def wait_for_quiet(limit: float, patience: float = PATIENCE) -> None:
    """Until others take no more than `limit` for a second, but no longer than `patience` seconds."""
    until = time.perf_counter() + patience
    while time.perf_counter() < until and (watched(lambda: time.sleep(1.0) or 0.0).others or 0.0) > limit:
        pass


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, limit: float = LIMIT
) -> dict[str, list[Taken]]:
    """What each contender gave in each round: all take their turn in every round, in an order drawn anew. Warming up is
    the caller's."""
    taken: dict[str, list[Taken]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            taken[name].append(patiently(contenders[name], limit))
        record.progress(f"round {number + 1} of {rounds}")
    return taken


def values(taken: Sequence[Taken]) -> list[Any]:
    return [one.value for one in taken]


def most(taken: Sequence[Taken]) -> float | None:
    """The largest share that others had."""
    known = [one.others for one in taken if one.others is not None]
    return max(known) if known else None
