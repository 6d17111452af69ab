"""Which expert leaves the cache.

An expert is a key, layer and number. Layers take turns, so an expert is needed again one token later at the earliest:
in a cache that holds less than a token's experts, recency over all layers would evict each expert just before its next
use. So under LRU, LFU and segmented LRU each layer has a share of the slots, and a layer that wants more than its share
evicts from its own. Frequency and NextUse estimate how soon an expert is used again, which compares over all layers.

Shapes: T tokens, L layers, B of them, E experts of a layer, K chosen, H half-lives.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]  # layer of the cache, expert

NEARLY_ALL: Final = 0.9  # of a layer's experts: of tokens that choose more, so do the next layer's
MOST_PARTS: Final = 8  # of a layer's experts, in which they come into memory where two parts fit
LATEST: Final = 1e6  # added to the values of experts that were used last
NEEDED: Final = 1e9  # and of those that the pass will use
PRIOR_TOKENS: Final = 2000  # that earlier runs count for at most


@dataclass(frozen=True)
class ExpertUsage:
    """`shares_LE`: of `tokens` tokens or more, those that chose each expert."""

    tokens: int
    shares_LE: NDArray[np.float64]


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
    def candidates(self, layer: int, needed_from: Key | None = None) -> Iterator[Key]:
        """Experts in the cache, the first to be evicted for an expert of `layer` first. Nothing changes while it is
        iterated. `needed_from`: the pass, a prompt's, will use this expert and all after it, which come last."""

    def catch_up(self) -> None:  # noqa: B027  (most policies have nothing to do)
        """Called while experts are being read: what takes time and can be done later."""

    def usage(self) -> ExpertUsage | None:
        """How often each expert was used; None where the policy does not know."""
        return None

    def prime(self, usage: ExpertUsage) -> None:  # noqa: B027  (most policies have no use for it)
        """Begin with what earlier runs used, before the first use."""


    @property
    def nbytes(self) -> int:
        """Of its tables."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))


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

    def candidates(self, layer: int, needed_from: Key | None = None) -> Iterator[Key]:
        own = len(self._layers[layer]) >= self.share
        others = sorted((at for at in range(len(self._layers)) if at != layer), key=lambda at: -len(self._layers[at]))
        needed = []
        for at in (layer, *others) if own else (*others, layer):
            for expert in self.order(at):
                if needed_from is not None and (at, expert) >= needed_from:
                    needed.append((at, expert))
                else:
                    yield at, expert
        yield from needed

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

    The estimate is the share of recent tokens that chose the expert, decayed with a half-life of HALF_LIVES[0] tokens.
    Uses are collected in a log, and computed while experts are being read; until then, the experts in the log are
    evicted last.
    """

    HALF_LIVES: tuple[float, ...] = (32.0,)  # tokens
    FLOOR: Final = 2e-3  # share of tokens below which experts differ by chance
    LOG: Final = 64  # tokens of a layer at most
    FEW_LAYERS: Final = 8  # of so few one has so many of the experts that what it chose last must count at once

    def __init__(self, capacity: int, layers: int, experts: int) -> None:
        self._decay_H1 = 0.5 ** (1 / np.array(self.HALF_LIVES))[:, None]
        self._sums_LHE = np.zeros((layers, len(self.HALF_LIVES), experts))
        self._tokens_L = np.zeros(layers)
        self._logs: list[list[NDArray[np.int64]]] = [[] for _ in range(layers)]
        self._log_tokens = [0] * layers
        self._changed: set[int] = set()  # layers that have a log
        self._values_LE = np.zeros((layers, experts), np.float32)
        self._ranks_LE = np.full((layers, experts), np.inf, np.float32)  # the value of what is in the cache

    def use(self, layer: int, ids_TK: NDArray[np.int64]) -> None:
        self._logs[layer].append(ids_TK)
        self._changed.add(layer)
        self._log_tokens[layer] += len(ids_TK)
        if self._log_tokens[layer] >= self.LOG:
            self._update([layer])

    def add(self, key: Key) -> None:
        self._ranks_LE[key] = self._values_LE[key]

    def remove(self, key: Key) -> None:
        self._ranks_LE[key] = np.inf

    def candidates(self, layer: int, needed_from: Key | None = None) -> Iterator[Key]:
        if len(self._logs) <= self.FEW_LAYERS:
            self.catch_up()
        ranks_LE = self._ranks_LE.copy()
        for changed in self._changed:
            for ids_TK in self._logs[changed]:
                ranks_LE[changed, ids_TK] += LATEST
        ranks = ranks_LE.ravel()
        if needed_from is not None:
            ranks = ranks.astype(np.float64)  # so that what is needed keeps its order
            ranks[needed_from[0] * ranks_LE.shape[1] + needed_from[1] :] += NEEDED
        while np.isfinite(ranks[at := int(ranks.argmin())]):
            yield divmod(at, ranks_LE.shape[1])
            ranks[at] = np.inf

    def catch_up(self) -> None:
        self._update(sorted(self._changed))

    def usage(self) -> ExpertUsage | None:
        self.catch_up()
        return ExpertUsage(int(self._tokens_L.max()), self._shares([*range(len(self._tokens_L))])[:, -1])

    def prime(self, usage: ExpertUsage) -> None:
        self._tokens_L += min(usage.tokens, PRIOR_TOKENS)
        self._sums_LHE += usage.shares_LE[:, None] * (1 - self._decay_H1 ** self._tokens_L[:, None, None])
        self._values_LE[:] = np.log(usage.shares_LE + self.FLOOR)

    def _update(self, layers: Sequence[int]) -> None:
        """Take what is in the logs of layers into their values; those with as many tokens together."""
        by_tokens: dict[int, list[int]] = {}
        for layer in layers:
            by_tokens.setdefault(self._log_tokens[layer], []).append(layer)
        for batch in by_tokens.values():
            ids_BTK = np.stack([np.concatenate(self._logs[layer]) for layer in batch])
            for layer in batch:
                self._logs[layer] = []
                self._log_tokens[layer] = 0
            self._changed -= {*batch}
            B, T, _ = ids_BTK.shape
            chosen_BTE = np.zeros((B, T, self._values_LE.shape[1]), np.float32)
            chosen_BTE[np.arange(B)[:, None, None], np.arange(T)[:, None], ids_BTK] = 1
            self._count(batch, chosen_BTE)
            values_BE = self._estimate(batch)
            self._values_LE[batch] = values_BE
            self._ranks_LE[batch] = np.where(np.isinf(self._ranks_LE[batch]), np.inf, values_BE)

    def _count(self, layers: list[int], chosen_BTE: NDArray[np.float32]) -> None:
        T = chosen_BTE.shape[1]
        weights_HT = (1 - self._decay_H1) * self._decay_H1 ** np.arange(T - 1, -1, -1)
        self._sums_LHE[layers] = self._sums_LHE[layers] * self._decay_H1**T + weights_HT @ chosen_BTE
        self._tokens_L[layers] += T

    def _shares(self, layers: list[int]) -> NDArray[np.float64]:
        """(B, H, E): the sums over what they would be for an expert that every token chose."""
        most_BH1 = 1 - self._decay_H1 ** self._tokens_L[layers][:, None, None]
        shares_BHE: NDArray[np.float64] = self._sums_LHE[layers] / np.maximum(most_BH1, 1e-12)
        return shares_BHE

    def _estimate(self, layers: list[int]) -> NDArray[np.float64]:
        """(B, E): what is larger is used sooner."""
        values_BE: NDArray[np.float64] = np.log(self._shares(layers)[:, 0] + self.FLOOR)
        return values_BE


class NextUse(Frequency):
    """As Frequency, with several half-lives, and with what the latest token tells about the next.

    log P(e) = sum_h w_h log share_h(e) + w_f sum_k log(P(e | k) / P(e)) + constant, over the half-lives h and the
    experts k that the latest token chose. P(e | k), how often e was chosen for the HISTORY tokens after one with k,
    each with half the weight of the one before, is smoothed with PRIOR tokens of P(e). The weights w are learned as
    tokens come, by Newton steps on the likelihood of what the next token chose, from START on: texts of one topic and
    texts that jump, routers that repeat themselves and routers that do not have each their own.
    """

    HALF_LIVES = (1.0, 4.0, 16.0, 64.0, 512.0, 8192.0)
    FLOORS: Final = (0.02, 0.01, 0.01, 0.01, 0.01, 0.01)
    HISTORY: Final = 4
    PRIOR: Final = 4.0
    START: Final = (0.0, 0.3, 0.2, 0.3, 0.1, 0.1, 0.5)
    CONFIDENCE: Final = 300.0  # in START, as information
    FORGET: Final = 0.9995  # of what was learned, per step
    LEARN_EVERY: Final = 5  # updates; prime to most numbers of layers

    def __init__(self, capacity: int, layers: int, experts: int) -> None:
        super().__init__(capacity, layers, experts)
        self._followers_LEE = np.zeros((layers, experts, experts), np.float32)  # [layer, k, e]
        self._before_LE = np.zeros((layers, experts), np.float32)  # tokens with k, as followers are counted
        self._history_LTE = np.zeros((layers, self.HISTORY, experts), np.float32)
        self._features: list[NDArray[np.float64] | None] = [None] * layers
        self._weights = np.array(self.START)
        self._information = np.eye(len(self._weights)) * self.CONFIDENCE
        self._steps = 0

    def _count(self, layers: list[int], chosen_BTE: NDArray[np.float32]) -> None:
        self._steps += 1
        if self._steps % self.LEARN_EVERY == 0:
            self._learn(self._features[layers[0]], chosen_BTE[0, 0])
        super()._count(layers, chosen_BTE)
        T = chosen_BTE.shape[1]
        history_BTE = np.concatenate((self._history_LTE[layers], chosen_BTE), axis=1)
        before_BTE = np.zeros_like(chosen_BTE)
        for ago in range(1, self.HISTORY + 1):
            before_BTE += np.float32(0.5**ago) * history_BTE[:, self.HISTORY - ago : self.HISTORY - ago + T]
        self._followers_LEE[layers] += before_BTE.transpose(0, 2, 1) @ chosen_BTE
        self._before_LE[layers] += before_BTE.sum(axis=1)
        self._history_LTE[layers] = history_BTE[:, T:]

    def _learn(self, features_HE: NDArray[np.float64] | None, chosen_E: NDArray[np.float32]) -> None:
        """A Newton step on sum_k log softmax(w . features)[k], over the experts k that a token chose."""
        if features_HE is None:
            return
        scores_E = self._weights @ features_HE
        p_E = np.exp(scores_E - scores_E.max())
        p_E /= p_E.sum()
        K, mean_H = chosen_E.sum(), features_HE @ p_E
        gradient = features_HE @ chosen_E - K * mean_H
        covariance = (features_HE * p_E) @ features_HE.T - np.outer(mean_H, mean_H)
        prior = np.eye(len(mean_H)) * self.CONFIDENCE
        self._information = self.FORGET * self._information + K * covariance + (1 - self.FORGET) * prior
        self._weights = self._weights + np.linalg.solve(self._information, gradient)

    def _estimate(self, layers: list[int]) -> NDArray[np.float64]:
        shares_BHE = self._shares(layers)
        latest_BK = np.stack([np.flatnonzero(self._history_LTE[layer, -1]) for layer in layers])
        rows = np.array(layers)[:, None], latest_BK
        p_B1E = shares_BHE[:, -1:] + 1e-4
        joint_BKE = self._followers_LEE[rows] + self.PRIOR * p_B1E
        ratio_BKE = joint_BKE / ((self._before_LE[rows][:, :, None] + self.PRIOR) * p_B1E)
        gain_B1E = np.log(ratio_BKE + 1e-3).sum(axis=1, keepdims=True)
        features_BHE = np.concatenate((np.log(shares_BHE + np.array(self.FLOORS)[:, None]), gain_B1E), axis=1)
        for layer, features_HE in zip(layers, features_BHE, strict=True):
            self._features[layer] = features_HE
        return self._weights @ features_BHE


POLICIES: Final[dict[str, type[Policy]]] = {
    "lru": LRU,
    "lfu": LFU,
    "slru": SegmentedLRU,
    "frequency": Frequency,
    "next-use": NextUse,
}
DEFAULT: Final = "next-use"


def policy_bytes(layers: int, experts: int) -> int:
    """That the tables of the default policy take, for so many layers of so many experts, which may be absurdly many:
    as `Policy.nbytes`, without making them."""
    half_lives, weights = len(NextUse.HALF_LIVES), len(NextUse.START)
    per_expert = 8 * half_lives + 4 * (NextUse.HISTORY + 3 + experts)
    return 8 * (half_lives + layers + weights + weights * weights) + layers * experts * per_expert
