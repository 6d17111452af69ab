"""Which expert leaves the cache.

An expert is a key, layer and number. Layers take turns, so an expert is needed again one token later at the earliest:
in a cache that holds less than a token's experts, recency over all layers would evict each expert just before its next
use. So under LRU, LFU and segmented LRU each layer has a share of the slots, and a layer that wants more than its share
evicts from its own. Frequency and NextUse estimate how soon an expert is used again, which compares over all layers.

Shapes: T tokens, L layers, E experts of a layer, K chosen.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]  # layer of the cache, expert


class Policy(ABC):
    """Keeps the order of eviction of the experts in the cache, for `capacity` slots and `layers` layers of up to
    `experts` experts each."""

    @abstractmethod
    def __init__(self, capacity: int, layers: int, experts: int) -> None: ...

    @abstractmethod
    def use(self, layer: int, ids_TK: NDArray[np.int64]) -> None:
        """Tokens choose experts of a layer, which may be in the cache or not; before those are added that are not."""

    @abstractmethod
    def add(self, key: Key) -> None:
        """An expert comes into the cache."""

    @abstractmethod
    def remove(self, key: Key) -> None:
        """An expert leaves the cache."""

    @abstractmethod
    def candidates(self, layer: int) -> Iterator[Key]:
        """Experts in the cache, the first to be evicted for an expert of `layer` first. Nothing changes while it is
        iterated."""


class SharedPolicy(Policy):
    """Each layer has its share of the slots, and an order of its own."""

    def __init__(self, capacity: int, layers: int, experts: int) -> None:
        self.share = max(1, capacity // max(1, layers))
        self._layers: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(layers)]

    def use(self, layer: int, ids_TK: NDArray[np.int64]) -> None:
        for expert in sorted(set(ids_TK.ravel().tolist())):
            self.count(layer, expert)
            if expert in self._layers[layer]:
                self.touch(layer, expert)

    def add(self, key: Key) -> None:
        layer, expert = key
        self._layers[layer][expert] = None

    def remove(self, key: Key) -> None:
        layer, expert = key
        del self._layers[layer][expert]

    def candidates(self, layer: int) -> Iterator[Key]:
        own = len(self._layers[layer]) >= self.share
        others = sorted((at for at in range(len(self._layers)) if at != layer), key=lambda at: -len(self._layers[at]))
        for at in (layer, *others) if own else (*others, layer):
            for expert in self.order(at):
                yield at, expert

    def count(self, layer: int, expert: int) -> None:
        """An expert is used, in the cache or not."""

    def touch(self, layer: int, expert: int) -> None:
        """An expert in the cache is used."""
        self._layers[layer].move_to_end(expert)

    def order(self, layer: int) -> Iterator[int]:
        """The layer's experts in the cache, the first to be evicted first."""
        yield from list(self._layers[layer])


class LRU(SharedPolicy):
    """The least recently used is evicted."""


class LFU(SharedPolicy):
    """The least frequently used is evicted, the least recently used of those; counts, also of experts that are not in
    the cache, are halved after every HALF_LIFE uses of a layer."""

    HALF_LIFE: Final = 1024

    def __init__(self, capacity: int, layers: int, experts: int) -> None:
        super().__init__(capacity, layers, experts)
        self._counts: list[dict[int, float]] = [{} for _ in range(layers)]
        self._uses = [0] * layers

    def count(self, layer: int, expert: int) -> None:
        counts = self._counts[layer]
        counts[expert] = counts.get(expert, 0.0) + 1.0
        self._uses[layer] += 1
        if self._uses[layer] >= self.HALF_LIFE:
            self._uses[layer] = 0
            self._counts[layer] = {expert: count / 2 for expert, count in counts.items()}

    def order(self, layer: int) -> Iterator[int]:
        counts = self._counts[layer]
        yield from sorted(self._layers[layer], key=lambda expert: counts.get(expert, 0.0))  # stable: oldest first


class SegmentedLRU(SharedPolicy):
    """An expert that is used again while in the cache is protected; of up to `PROTECTED` of a layer's share. Others
    are evicted first."""

    PROTECTED: Final = 0.8

    def __init__(self, capacity: int, layers: int, experts: int) -> None:
        super().__init__(capacity, layers, experts)
        self._limit = max(1, int(self.PROTECTED * self.share))
        self._protected: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(layers)]

    def remove(self, key: Key) -> None:
        super().remove(key)
        self._protected[key[0]].pop(key[1], None)

    def touch(self, layer: int, expert: int) -> None:
        super().touch(layer, expert)
        protected = self._protected[layer]
        protected[expert] = None
        protected.move_to_end(expert)
        if len(protected) > self._limit:
            protected.popitem(last=False)

    def order(self, layer: int) -> Iterator[int]:
        protected = self._protected[layer]
        yield from [expert for expert in self._layers[layer] if expert not in protected]
        yield from list(protected)


class Frequency(Policy):
    """The expert least likely to be used for its layer's next token is evicted, of whichever layer it is.

    The estimate is the share of recent tokens that chose the expert: the mean of exponentially decayed shares with
    HALF_LIVES tokens. Uses are collected, and computed only when an expert must leave or LOG tokens have come.
    """

    HALF_LIVES: Final = (4.0, 64.0)  # tokens
    LOG: Final = 64  # tokens of a layer
    FLOOR: Final = 1e-3  # share of tokens below which experts differ by chance

    def __init__(self, capacity: int, layers: int, experts: int) -> None:
        self._decay = np.array([0.5 ** (1 / half_life) for half_life in self.HALF_LIVES], np.float32)
        self._shares_LHE = np.zeros((layers, len(self._decay), experts), np.float32)
        self._logs: list[list[NDArray[np.int64]]] = [[] for _ in range(layers)]
        self._changed: set[int] = set()  # layers with a log
        self._tokens = [0] * layers  # in the log
        self._values_LE = np.zeros((layers, experts), np.float32)
        self._ranks_LE = np.full((layers, experts), np.inf, np.float32)  # values of what is in the cache
        self._cached_LE = np.zeros((layers, experts), bool)

    def use(self, layer: int, ids_TK: NDArray[np.int64]) -> None:
        self._logs[layer].append(ids_TK)
        self._changed.add(layer)
        self._tokens[layer] += len(ids_TK)
        if self._tokens[layer] >= self.LOG:
            self._update(layer)

    def add(self, key: Key) -> None:
        self._cached_LE[key] = True
        self._ranks_LE[key] = self._values_LE[key]

    def remove(self, key: Key) -> None:
        self._cached_LE[key] = False
        self._ranks_LE[key] = np.inf

    def candidates(self, layer: int) -> Iterator[Key]:
        for changed in [*self._changed]:
            self._update(changed)
        ranks = self._ranks_LE.ravel().copy()
        experts = self._ranks_LE.shape[1]
        while np.isfinite(ranks[at := int(ranks.argmin())]):
            yield divmod(at, experts)
            ranks[at] = np.inf

    def _update(self, layer: int) -> None:
        """Take what is in a layer's log into its values."""
        log = self._logs[layer]
        ids_TK = log[0] if len(log) == 1 else np.concatenate(log)
        self._logs[layer] = []
        self._tokens[layer] = 0
        self._changed.discard(layer)
        chosen_TE = np.zeros((len(ids_TK), self._values_LE.shape[1]), np.float32)
        chosen_TE[np.arange(len(ids_TK))[:, None], ids_TK] = 1
        self._count(layer, chosen_TE)
        self._values_LE[layer] = self._estimate(layer)
        self._ranks_LE[layer] = np.where(self._cached_LE[layer], self._values_LE[layer], np.inf)

    def _count(self, layer: int, chosen_TE: NDArray[np.float32]) -> None:
        T = len(chosen_TE)
        weights_HT = (1 - self._decay[:, None]) * self._decay[:, None] ** np.arange(T - 1, -1, -1)
        self._shares_LHE[layer] *= self._decay[:, None] ** T
        self._shares_LHE[layer] += weights_HT.astype(np.float32) @ chosen_TE

    def _estimate(self, layer: int) -> NDArray[np.float32]:
        """Of each expert; what is larger is used sooner."""
        share_E: NDArray[np.float32] = np.log(self._shares_LHE[layer].mean(axis=0) + self.FLOOR)
        return share_E


class NextUse(Frequency):
    """As Frequency, and learns which experts follow which.

    followers[e', e] counts how often expert e' was chosen for the token after one with e, the tokens before that with
    half the weight of the next. Under naive Bayes with the experts e of the latest tokens as evidence, of weight w_e:

        log P(e') ~ log share(e') + EVIDENCE * sum_e w_e log(P(e' | e) / P(e'))

    P(e' | e) is smoothed with PRIOR tokens of P(e'). Half of the exponent that naive Bayes has, because experts that
    are chosen together say much the same.
    """

    RECENT: Final = 4  # tokens
    PRIOR: Final = 4.0
    EVIDENCE: Final = 0.5

    def __init__(self, capacity: int, layers: int, experts: int) -> None:
        super().__init__(capacity, layers, experts)
        self._followers_LEE = np.zeros((layers, experts, experts), np.float32)
        self._chosen_LE = np.zeros((layers, experts), np.float32)  # all tokens
        self._evidence_LE = np.zeros((layers, experts), np.float32)  # sum of what followers were counted with
        self._totals = np.zeros(layers)
        self._recent_LRE = np.zeros((layers, self.RECENT, experts), np.float32)

    def _count(self, layer: int, chosen_TE: NDArray[np.float32]) -> None:
        super()._count(layer, chosen_TE)
        T = len(chosen_TE)
        history_TE = np.concatenate((self._recent_LRE[layer], chosen_TE))
        weights_TE = self._weights(history_TE)
        self._recent_LRE[layer] = history_TE[T:]
        self._followers_LEE[layer] += chosen_TE.T @ weights_TE[:-1]
        self._evidence_LE[layer] += weights_TE[:-1].sum(axis=0)
        self._chosen_LE[layer] += chosen_TE.sum(axis=0)
        self._totals[layer] += T
        self._latest_E = weights_TE[-1]

    def _weights(self, history_TE: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of each expert as evidence, before each token but the first RECENT, and after the last."""
        T = len(history_TE) - self.RECENT
        weights_TE = np.zeros((T + 1, history_TE.shape[1]), np.float32)
        for ago in range(1, self.RECENT + 1):
            weights_TE += np.float32(0.5**ago) * history_TE[self.RECENT - ago : self.RECENT - ago + T + 1]
        return weights_TE

    def _estimate(self, layer: int) -> NDArray[np.float32]:
        shares_E = super()._estimate(layer)
        used = np.flatnonzero(self._latest_E)
        weights = self._latest_E[used]
        probability_E = (self._chosen_LE[layer] + 1e-2) / (self._totals[layer] + 1)
        joint = self._followers_LEE[layer][:, used] + self.PRIOR * probability_E[:, None]
        joint /= (self._evidence_LE[layer, used] + self.PRIOR) * probability_E[:, None]
        gain_E: NDArray[np.float32] = np.log(joint + self.FLOOR) @ weights
        estimate: NDArray[np.float32] = shares_E + self.EVIDENCE * gain_E
        return estimate


POLICIES: Final[dict[str, type[Policy]]] = {
    "lru": LRU,
    "lfu": LFU,
    "slru": SegmentedLRU,
    "frequency": Frequency,
    "next-use": NextUse,
}
DEFAULT: Final = "lru"
