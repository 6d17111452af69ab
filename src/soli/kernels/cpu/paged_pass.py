"""A fused forward pass whose experts are not all in memory: it stops at a layer that misses some, and continues there.

Shapes: T tokens, M layers with a router, E experts, K chosen.
"""

import time
from collections.abc import Iterator, Sequence
from ctypes import addressof
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soli.analysis.residency import PassResidency
from soli.kernels.cpu import native
from soli.kernels.cpu.structs import CForwardArgs, CPaging

MAX_PREDICTED_TOKENS: Final = 16  # as in csrc/forward_prediction.h
READ_FAILED: Final = [*native.ERRORS].index("READ_FAILED")


class ExpertPager(Protocol):
    """Brings a layer's experts into memory; see soli.experts.store."""

    expert_bytes_E: Tensor  # int64, that are read for each

    def windows(
        self, expert_ids_TK: Tensor, wait: bool = True, states_E: NDArray[np.uint8] | None = None
    ) -> Iterator[range]:
        """The layer's experts 0 ... E - 1 in consecutive ranges. When a range is taken, those of its experts that
        tokens chose are in memory, or without `wait` being read, until the next is taken. `states_E`: gets what is
        found to be missing."""

    @property
    def prefetches(self) -> bool:
        """Whether the next pass is to guess which experts a layer will choose."""

    def prefetch(self, expert_ids_TK: Tensor) -> None:
        """Reads experts ahead that the layer may choose."""

    def observe(self, seconds: float) -> None:
        """A pass of a few tokens that waited for experts took so long."""

    def count_wait(self, seconds: float) -> None:
        """A pass was held up so long by reading."""

    def record(self, expert_ids_TK: Tensor) -> None:
        """Counts a pass that found all experts in memory."""

    def raise_failure(self) -> None:
        """The error of an expert that could not be read."""


class PagedPass:
    """One pass of `args` through layers whose experts `pagers` bring into memory, None for a layer without.

    `router_index`: for each layer, how many before it have a router. `ids_MTK` gets what tokens choose, `residency`
    where each expert was when its layer needed it.
    """

    def __init__(
        self,
        kernels: native.Library,
        args: CForwardArgs,
        pagers: Sequence[ExpertPager | None],
        router_index: Sequence[int],
        ids_MTK: Tensor,
        residency: PassResidency,
    ) -> None:
        self._kernels, self._args = kernels, args
        self._pagers, self._router_index = pagers, router_index
        self._ids_MTK, self._residency = ids_MTK, residency
        T, K = ids_MTK.shape[1:]
        self._few_tokens = T <= MAX_PREDICTED_TOKENS
        self._predicted_TK = torch.empty(min(T, MAX_PREDICTED_TOKENS), K, dtype=torch.int64)
        guesses = self._few_tokens and any(pager.prefetches for pager in pagers if pager)
        self._paging = CPaging(layer=-1, predicted=self._predicted_TK.data_ptr() if guesses else None)
        args.paging = addressof(self._paging)
        self._recorded = 0  # layers whose experts the pagers know to be used

    def run(self) -> None:
        """Compute the pass. SoliError where an expert cannot be read."""
        start = time.perf_counter()
        self._call()
        while self._paging.layer >= 0:
            self._complete_layer(self._paging.layer)
        stopped = self._recorded > 0
        self._record_hits(len(self._pagers))
        pager = next(pager for pager in self._pagers if pager is not None)
        pager.count_wait(self._residency.waited_seconds)
        if stopped and self._few_tokens:
            pager.observe(time.perf_counter() - start)

    def _call(self) -> None:
        """Compute until the pass stops or ends."""
        code = self._kernels.forward(addressof(self._args))
        pager = self._pagers[self._paging.layer]
        if code == READ_FAILED and pager is not None:
            pager.raise_failure()
        native.check_error(code)

    def _complete_layer(self, layer: int) -> None:
        """The experts of the layer where the pass stopped; with the last of them it goes on to the layers after."""
        stopped_at = time.perf_counter_ns()
        paging, pager, index = self._paging, self._pagers[layer], self._router_index[layer]
        assert pager is not None
        self._record_hits(layer)
        following = self._pagers[layer + 1] if paging.predicted_tokens else None
        states_E = self._residency.states_ME[index].numpy()
        for window in pager.windows(self._ids_MTK[index], wait=False, states_E=states_E):
            if following is not None:
                following.prefetch(self._predicted_TK)
                following = None
            paging.layer, paging.begin, paging.end = layer, window.start, window.stop
            self._residency.waited_M[index] += time.perf_counter_ns() - stopped_at
            self._call()
            stopped_at = time.perf_counter_ns()
        self._recorded = layer + 1

    def _record_hits(self, stop: int) -> None:
        """Tell the pagers of layers before `stop` in which the pass did not stop."""
        for layer in range(self._recorded, stop):
            pager = self._pagers[layer]
            if pager is not None:
                pager.record(self._ids_MTK[self._router_index[layer]])
