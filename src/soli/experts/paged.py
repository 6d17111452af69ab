"""The experts of a layer as the model's experts seam sees them, where they are read from disk as they are needed.

Shapes: E experts, T tokens, K chosen, D hidden, F expert width, M layers with a router.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soli.analysis.residency import TIERS, PassResidency, Residency, ResidencyRecorder, Tier
from soli.experts.paging_stats import StoreStats
from soli.experts.prefetch import Prefetcher
from soli.experts.sources import LayerSource
from soli.formats.quantized import QuantizedWeight
from soli.kernels import QuantizedExperts
from soli.kernels.cpu import EXPERT_STATES, ExpertTable

MISSING, READING, PRESENT, FAILED = range(len(EXPERT_STATES))


class Store(Protocol):
    """What has the experts of all layers in memory or reads them: soli.experts.store.ExpertStore."""

    capacity: int
    stats: StoreStats
    prefetcher: Prefetcher
    recorded_states_E: NDArray[np.uint8] | None

    @property
    def holds_all(self) -> bool: ...
    def use(self, layer: int, expert_ids_TK: Tensor) -> None: ...
    def record(self, layer: int, expert_ids_TK: Tensor) -> None: ...
    def prefetch(self, layer: int, guessed: Sequence[int]) -> None: ...
    def wait(self, layer: int, experts: Sequence[int]) -> None: ...
    def weights(self, layer: int, expert: int) -> tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]: ...
    def windows(
        self, layer: int, chosen: Sequence[int], wait: bool, states_E: NDArray[np.uint8] | None = None
    ) -> Iterator[range]: ...


class PagedExperts(QuantizedExperts):
    """The experts of a layer as the model's experts seam sees them, read from disk when they are needed.

    `gates[e]`, `ups[e]` and `downs[e]` read expert e; the C++ kernels take `windows` and `table`.
    """

    @classmethod
    def of(cls, store: Store, layer: int, source: LayerSource) -> Self:
        """Layer number `layer` of a store."""
        E = len(source.experts)
        parts = (_Matrices(E, partial(_nth_weight, store, layer, nth)) for nth in range(3))
        experts = cls(*parts)
        gate, up, down = source.matrices
        states_E = torch.zeros(E, dtype=torch.uint8)
        addresses_3E2 = torch.zeros(3, E, 2, dtype=torch.int64)
        D, F = down.shape
        formats = (gate.format, gate.group), (down.format, down.group)
        table = ExpertTable(*formats, (E, D, F), addresses_3E2, (), states_E)
        attributes = {
            "_store": store,
            "_layer": layer,
            "table": table,
            "uniform": gate == up,
            "formats": (gate.format, down.format),
            "states": states_E.numpy(),
            "values_like": torch.empty(0, dtype=down.values_dtype),
            "expert_bytes_E": torch.tensor([sum(read.length for read in one.reads) for one in source.experts]),
        }
        for name, value in attributes.items():
            object.__setattr__(experts, name, value)
        return experts

    _store: Store
    _layer: int
    states: NDArray[np.uint8]
    expert_bytes_E: Tensor  # int64, that are read for each

    @property
    def capacity(self) -> int:
        """How many experts of all layers are in memory at once."""
        return self._store.capacity

    @property
    def tiers(self) -> list[Tier]:
        """Where each expert is now."""
        return [TIERS[MISSING if state == FAILED else state] for state in self.states.tolist()]

    def set_addresses(self, expert: int, addresses_32: Tensor) -> None:
        self.table.addresses_3E2[:, expert] = addresses_32

    def windows(
        self, expert_ids_TK: Tensor, wait: bool = True, states_E: NDArray[np.uint8] | None = None
    ) -> Iterator[range]:
        self._store.use(self._layer, expert_ids_TK)
        return self._store.windows(self._layer, chosen_experts(expert_ids_TK), wait, states_E)

    def residency_recorder(self, expert_ids_TK: Tensor) -> ResidencyRecorder:
        return LayerRecorder(self._store, self, expert_ids_TK)

    def record(self, expert_ids_TK: Tensor) -> None:
        """Count a pass in which all experts that tokens chose were in memory."""
        self._store.record(self._layer, expert_ids_TK)

    @property
    def prefetches(self) -> bool:
        """Whether the next pass is to guess experts."""
        return not self._store.holds_all and self._store.prefetcher.enabled

    def prefetch(self, expert_ids_TK: Tensor) -> None:
        """Read experts ahead that the layer may choose."""
        self._store.prefetch(self._layer, chosen_experts(expert_ids_TK))

    def observe(self, seconds: float) -> None:
        """A pass of a few tokens that waited for experts took so long."""
        self._store.prefetcher.observe(seconds)

    def count_wait(self, seconds: float) -> None:
        """A pass was held up so long by reading."""
        self._store.stats.waited_seconds += seconds

    def raise_failure(self) -> None:
        """The error of an expert that could not be read."""
        failed = [expert for expert, state in enumerate(self.states.tolist()) if state == FAILED]
        self._store.wait(self._layer, failed)


class LayerRecorder:
    """Where the experts of a layer are while modules compute it, one after another."""

    def __init__(self, store: Store, experts: PagedExperts, expert_ids_TK: Tensor) -> None:
        self._store, self._expert_ids_TK = store, expert_ids_TK
        self._waited = store.stats.waited_seconds
        self._residency = PassResidency.empty(len(expert_ids_TK), experts.expert_bytes_E[None])
        states_E = self._residency.states_ME[0].numpy()
        states_E[:] = experts.states
        states_E[states_E == FAILED] = MISSING  # in an earlier pass
        store.recorded_states_E = states_E

    def finish(self) -> Residency:
        """When the layer has been computed."""
        self._store.recorded_states_E = None
        waited = self._store.stats.waited_seconds - self._waited
        self._residency.waited_M[0] = round(1e9 * waited)
        return self._residency.of_layer(0, self._expert_ids_TK)


def chosen_experts(expert_ids_TK: Tensor) -> list[int]:
    """Each expert that a token chose, once, in ascending order."""
    return sorted(set(expert_ids_TK.flatten().tolist()))


def _nth_weight(store: Store, layer: int, nth: int, expert: int) -> QuantizedWeight:
    return store.weights(layer, expert)[nth]


class _Matrices(Sequence[QuantizedWeight]):
    """The gates, ups or downs of a layer, each read when it is asked for."""

    def __init__(self, count: int, get: Callable[[int], QuantizedWeight]) -> None:
        self._count, self._get = count, get

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> QuantizedWeight: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[QuantizedWeight]: ...
    def __getitem__(self, index: int | slice) -> QuantizedWeight | Sequence[QuantizedWeight]:
        if isinstance(index, slice):
            return [self._get(at) for at in range(self._count)[index]]
        return self._get(range(self._count)[index])
