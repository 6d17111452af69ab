"""Which expert leaves the cache: LRU, LFU with ageing, segmented LRU.

An expert is a key, layer and number. Layers take turns, so an expert is needed again one token later at the earliest:
in a cache that holds less than a token's experts, recency over all layers would evict each expert just before its next
use. So each layer has a share of the slots, and a layer that wants more than its share evicts from its own.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

Key = tuple[int, int]  # layer of the cache, expert


class Policy(ABC):
    """Keeps the order of eviction of the experts in the cache, for `capacity` slots and `layers` layers."""

    def __init__(self, capacity: int, layers: int) -> None:
        self.share = max(1, capacity // max(1, layers))
        self._layers: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(layers)]

    def candidates(self, layer: int) -> Iterator[Key]:
        """Experts in the cache, the first to be evicted for an expert of `layer` first."""
        own = len(self._layers[layer]) >= self.share
        others = sorted((at for at in range(len(self._layers)) if at != layer), key=lambda at: -len(self._layers[at]))
        for at in (layer, *others) if own else (*others, layer):
            for expert in self.order(at):
                yield at, expert

    def add(self, key: Key) -> None:
        """An expert comes into the cache."""
        self._layers[key[0]][key[1]] = 0
        self.touch(key)

    def remove(self, key: Key) -> None:
        """An expert leaves the cache."""
        del self._layers[key[0]][key[1]]

    @abstractmethod
    def touch(self, key: Key) -> None:
        """An expert in the cache is used."""

    @abstractmethod
    def order(self, layer: int) -> Iterator[int]:
        """The layer's experts in the cache, the first to be evicted first. Nothing changes while it is iterated."""


class LRU(Policy):
    """The least recently used is evicted."""

    def touch(self, key: Key) -> None:
        self._layers[key[0]].move_to_end(key[1])

    def order(self, layer: int) -> Iterator[int]:
        yield from list(self._layers[layer])


class LFU(Policy):
    """The least frequently used is evicted, the least recently used of those; counts, also of experts that are not in
    the cache, are halved after every HALF_LIFE uses of a layer."""

    HALF_LIFE: Final = 1024

    def __init__(self, capacity: int, layers: int) -> None:
        super().__init__(capacity, layers)
        self._counts: list[dict[int, float]] = [{} for _ in range(layers)]
        self._uses = [0] * layers

    def touch(self, key: Key) -> None:
        layer, expert = key
        counts = self._counts[layer]
        counts[expert] = counts.get(expert, 0.0) + 1.0
        self._layers[layer].move_to_end(expert)
        self._uses[layer] += 1
        if self._uses[layer] >= self.HALF_LIFE:
            self._uses[layer] = 0
            self._counts[layer] = {expert: count / 2 for expert, count in counts.items()}

    def order(self, layer: int) -> Iterator[int]:
        counts = self._counts[layer]
        yield from sorted(self._layers[layer], key=lambda expert: counts.get(expert, 0.0))  # stable: oldest first


class SegmentedLRU(Policy):
    """An expert that is used again while in the cache is protected; of up to `PROTECTED` of a layer's share. Others
    are evicted first."""

    PROTECTED: Final = 0.8

    def __init__(self, capacity: int, layers: int) -> None:
        super().__init__(capacity, layers)
        self._limit = max(1, int(self.PROTECTED * self.share))
        self._protected: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(layers)]

    def add(self, key: Key) -> None:
        self._layers[key[0]][key[1]] = 0

    def remove(self, key: Key) -> None:
        super().remove(key)
        self._protected[key[0]].pop(key[1], None)

    def touch(self, key: Key) -> None:
        layer, expert = key
        self._layers[layer].move_to_end(expert)
        protected = self._protected[layer]
        protected[expert] = None
        protected.move_to_end(expert)
        if len(protected) > self._limit:
            protected.popitem(last=False)

    def order(self, layer: int) -> Iterator[int]:
        protected = self._protected[layer]
        yield from [expert for expert in self._layers[layer] if expert not in protected]
        yield from list(protected)


POLICIES: Final[dict[str, type[Policy]]] = {"lru": LRU, "lfu": LFU, "slru": SegmentedLRU}
DEFAULT: Final = "lru"
