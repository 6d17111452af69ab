"""What a cache of experts would have had in memory: the store's policies, and the best possible, over a trace.

A token is a step, and each layer chooses its experts in turn, as in decoding one text. The policies are those of the
store, told the same. Belady's rule evicts the expert whose next use is the furthest, which no policy can know; under
the store's rule, that the experts a layer chose are in memory at the same time, in slots that all layers share, none
has more hits.

Shapes: T tokens, L layers, E experts of a layer, K chosen.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from soli.errors import SoliError
from soli.experts.policy import POLICIES, Key, Policy
from soli.experts.trace import ExpertTrace

BELADY: Final = "belady"
NEVER: Final = 2**62


@dataclass(frozen=True)
class Replay:
    """Hits of `uses`, by one policy with `capacity` slots. `bytes_per_token` read, None where an expert's size is not
    known."""

    policy: str
    capacity: int
    uses: int
    hits: int
    bytes_per_token: float | None

    @property
    def hit_rate(self) -> float:
        return self.hits / self.uses


def replay(trace: ExpertTrace, policy: str, capacity: int, skip: int = 0) -> Replay:
    """Count hits from token `skip` on. SoliError for fewer slots than a token chooses in a layer."""
    T, L, K = trace.expert_ids_TLK.shape
    if capacity < K:
        raise SoliError(f"a token chooses {K} experts of a layer, but the cache has room for {capacity}: give it more")
    if not 0 <= skip < T:
        raise SoliError(f"{skip:,} tokens are left out of {T:,}: leave out fewer")
    capacity = min(capacity, trace.all_experts)
    order = _Belady(trace) if policy == BELADY else _policy(policy, capacity, L, trace.experts)
    per_step = [*_misses(trace.expert_ids_TLK, order, capacity)]
    misses = sum(per_step[skip * L :])
    uses = (T - skip) * L * K
    read = misses / (T - skip) * trace.expert_bytes if trace.expert_bytes else None
    return Replay(policy, capacity, uses, uses - misses, read)


def _policy(name: str, capacity: int, layers: int, experts: int) -> Policy:
    if name not in POLICIES:
        raise SoliError(f"there is no policy {name!r}: choose {', '.join((*POLICIES, BELADY))}")
    return POLICIES[name](capacity, layers, experts)


def _misses(ids_TLK: NDArray[np.int64], policy: Policy, capacity: int) -> Iterator[int]:
    """For each token and layer, how many experts were not in the cache; evictions as in the store."""
    cached: set[Key] = set()
    for ids_LK in ids_TLK:
        for layer, ids_K in enumerate(ids_LK):
            chosen = {(layer, expert) for expert in ids_K.tolist()}
            policy.use(layer, ids_K[None])
            absent = sorted(chosen - cached)
            for key in absent:
                if len(cached) == capacity:
                    evicted = next(other for other in policy.candidates(layer) if other not in chosen)
                    policy.remove(evicted)
                    cached.remove(evicted)
                policy.add(key)
                cached.add(key)
            if absent:
                policy.catch_up()
            yield len(absent)


class _Belady(Policy):
    """Knows the whole trace: the expert whose next use is the furthest is evicted."""

    def __init__(self, trace: ExpertTrace) -> None:
        self._following = _next_uses(trace.expert_ids_TLK)
        self._next: dict[Key, int] = {}
        self._heap: list[tuple[int, Key]] = []  # the furthest first; entries of what was used since are ignored
        self._cached: set[Key] = set()
        self._steps = 0

    def use(self, layer: int, ids_TK: NDArray[np.int64]) -> None:
        for expert, following in zip(ids_TK[0].tolist(), self._following[self._steps].tolist(), strict=True):
            self._next[layer, expert] = following
            if (layer, expert) in self._cached:
                heapq.heappush(self._heap, (-following, (layer, expert)))
        self._steps += 1

    def add(self, key: Key) -> None:
        self._cached.add(key)
        heapq.heappush(self._heap, (-self._next[key], key))

    def remove(self, key: Key) -> None:
        self._cached.remove(key)

    def candidates(self, layer: int, needed_from: Key | None = None) -> Iterator[Key]:
        passed: list[tuple[int, Key]] = []
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                following, key = -entry[0], entry[1]
                if key in self._cached and self._next[key] == following:
                    passed.append(entry)
                    yield key
        finally:
            for entry in passed:
                heapq.heappush(self._heap, entry)


def _next_uses(ids_TLK: NDArray[np.int64]) -> NDArray[np.int64]:
    """(T * L, K): at which step, layer after layer, each expert is used next."""
    T, L, K = ids_TLK.shape
    following = np.full((T, L, K), NEVER, np.int64)
    upcoming_LE = np.full((L, int(ids_TLK.max()) + 1), NEVER, np.int64)
    layers = np.arange(L)[:, None]
    for at in range(T - 1, -1, -1):
        following[at] = upcoming_LE[layers, ids_TLK[at]]
        upcoming_LE[layers, ids_TLK[at]] = at * L + layers
    return following.reshape(T * L, K)


def gained(hit_rate: float, lru: float, best: float) -> float | None:
    """Which part of the distance from LRU to the best possible a policy has; None where there is no distance."""
    return (hit_rate - lru) / (best - lru) if best > lru else None


def names(policies: Sequence[str] = ()) -> list[str]:
    """All policies, the best possible last, or those that are named."""
    return [*policies] or [*POLICIES, BELADY]
