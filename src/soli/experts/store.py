"""The expert store: a cache of a stated number of bytes over the files that a model's routed experts are in.

A slot holds one expert. The experts of a layer are a table of addresses and states (`soli.kernels.cpu.ExpertTable`),
which the C++ kernels read; the store changes it only while no kernel runs, but for the state of an expert that is being
read, which the thread that reads it changes. So a kernel can compute the experts that are in memory while the others
are read, and waits for each in turn.

When a batch chooses more experts of a layer than fit, or nearly all, they come in windows, in ascending order: each is
read once, and while one window is computed the next is read. A prompt, which chooses nearly all experts of each layer,
reads the next layer's first ones while it computes the last window and the attention after it, and takes slots from
experts that it has used before any that it will use. Results have the same bits as with all experts in memory.

One thread at a time may use a store. Shapes: E experts, T tokens, K chosen, D hidden, F expert width.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from soli.experts.paged import FAILED, MISSING, PRESENT, READING, PagedExperts, chosen_experts
from soli.experts.paging_stats import PagingStats, StoreStats
from soli.experts.policy import DEFAULT, MOST_PARTS, NEARLY_ALL, POLICIES, ExpertUsage, Key
from soli.experts.prefetch import Prefetcher
from soli.experts.reading import USUAL, Pending, Reader, Settings
from soli.experts.slots import Slots
from soli.experts.sources import Sources
from soli.formats.quantized import QuantizedWeight

PROMPT_SHARE: Final = 3 / 4  # of a layer's experts: tokens that choose more of them are a prompt's
AHEAD_SHARE: Final = 1 / 16  # of all slots, that a prompt fills at least with experts of the next layer
PRELOAD_SECONDS: Final = 2.0
PRELOAD_AT_ONCE: Final = 32  # experts


class ExpertStore:
    """`capacity` slots for the experts of `sources`. `poison` fills slots before they are read, for tests.

    SoliError for fewer slots than one token chooses in a layer.
    """

    def __init__(
        self,
        sources: Sources,
        capacity: int,
        *,
        policy: str = DEFAULT,
        prefetch: str = "auto",
        settings: Settings = USUAL,
        poison: bool = False,
    ) -> None:
        self.sources = sources
        self.slot_bytes = sources.slot_bytes
        self._poison, self._policy_name = poison, policy
        self.stats = StoreStats()
        self._preloaded = 0, 0.0  # bytes, seconds
        self._locked: set[Key] = set()
        self._needed_from: Key | None = None  # this expert and all after it are used later in the pass of a prompt
        self.prefetcher = Prefetcher(prefetch)
        self._guesses: dict[Key, Pending] = {}  # experts that are read ahead, until a layer knows what it needs
        self._open_guesses: set[Key] = set()  # of which is not known whether they are right
        self._errors: dict[Key, Exception] = {}
        self._verified: set[Key] = set()
        self.recorded_states_E: NDArray[np.uint8] | None = None  # of the layer that is computed: gets what is missing
        self._slots: dict[Key, int] = {}
        self._arrived = threading.Condition()
        self.layers = [PagedExperts.of(self, at, source) for at, source in enumerate(sources.layers)]
        self.reader = Reader(sources.files, settings)
        self.resize(capacity)

    def resize(self, capacity: int) -> None:
        """Make room for `capacity` experts; those in memory are forgotten. No pass may be running."""
        self._resolve_guesses(None, ())
        for key in [*self._slots]:
            self.wait_for_any(key)
            self._release(key)
        self._errors.clear()
        self.capacity = min(capacity, self.sources.count)
        self.memory = Slots(self.sources, self.capacity, self._verified)
        self._free = [*range(self.capacity)][::-1]
        experts = max(len(layer.experts) for layer in self.sources.layers)
        self.policy = POLICIES[self._policy_name](self.capacity, len(self.sources.layers), experts)

    @property
    def holds_all(self) -> bool:
        """Whether no expert is ever evicted."""
        return self.capacity >= self.sources.count

    @property
    def nbytes(self) -> int:
        """Of all slots."""
        return self.capacity * self.slot_bytes

    def windows(
        self, layer: int, chosen: Sequence[int], wait: bool, states_E: NDArray[np.uint8] | None = None
    ) -> Iterator[range]:
        """The experts 0 ... E - 1 of a layer in consecutive ranges, for tokens that chose `chosen`, in ascending order.

        While a range is used, the experts chosen from it are in memory; without `wait` they may still be on their way
        (see EXPERT_STATES). `states_E` gets what is missing when it is needed. SoliError where one cannot be read.
        """
        if states_E is not None:
            self.recorded_states_E = states_E
        E, states = len(self.sources.layers[layer].experts), self.layers[layer].states
        start = time.perf_counter()
        self._resolve_guesses(layer, chosen)
        parts = self._parts(layer, chosen)
        is_prompt = len(chosen) > E * PROMPT_SHARE
        misses = self.stats.misses
        try:
            self._load(layer, parts[0], parts[0], is_prompt)
            if self.stats.misses > misses:
                self.policy.catch_up()
            for at, part in enumerate(parts):
                following = parts[at + 1] if at + 1 < len(parts) else ()
                both_fit = len(part) + len(following) <= self.capacity
                if both_fit:
                    self._load(layer, following, (*part, *following), is_prompt)
                if not following and len(chosen) > E * NEARLY_ALL:
                    self._read_ahead(layer + 1, 2 * len(parts[0]))
                if wait and any(states[expert] != PRESENT for expert in part):
                    self.wait(layer, part)
                    self.stats.waited_seconds += time.perf_counter() - start
                yield range(part[0] if at else 0, following[0] if following else E)
                start = time.perf_counter()
                self.wait(layer, part)
                if not both_fit:
                    self._load(layer, following, following, is_prompt)
        finally:
            self._locked.clear()
            self._needed_from = None
            self.recorded_states_E = None

    def _read_ahead(self, layer: int, count: int) -> None:
        """Read the first of a layer's experts that are not in memory, `count` or more, into the slots of experts that
        the pass of a prompt will not use again; those of the window that is about to be computed are locked."""
        if layer == len(self.layers) or self.holds_all or self.prefetcher.mode == "off":
            return
        self._needed_from = layer, 0
        missing = np.flatnonzero(self.layers[layer].states == MISSING).tolist()
        for expert in missing[: max(count, int(self.capacity * AHEAD_SHARE))]:
            slot = self._take_slot(layer, wait=False)
            if slot is None:
                break
            self._read((layer, expert), slot)

    def prefetch(self, layer: int, guessed: Sequence[int]) -> None:
        """Read experts ahead that the layer may need, while nothing that is needed is being read. What is locked, or is
        guessed, stays in memory."""
        states = self.layers[layer].states
        missing = [expert for expert in guessed if states[expert] == MISSING]
        locked = self._locked
        self._locked = locked | {(layer, expert) for expert in guessed}
        for expert in missing[: max(0, self.capacity - len(self._locked))]:
            slot = self._take_slot(layer, wait=False)
            if slot is None:
                break
            self.prefetcher.stats.guessed += 1
            self._open_guesses.add((layer, expert))
            self._guesses[layer, expert] = self._read((layer, expert), slot, needed=False)
        self._locked = locked

    def _resolve_guesses(self, layer: int | None, chosen: Sequence[int]) -> None:
        """The layer knows what it needs: right guesses are read at once, others dropped where nothing was read yet."""
        used = {key for key in self._open_guesses if key[0] == layer and key[1] in chosen}
        self.prefetcher.stats.used += len(used)
        self._open_guesses = {key for key in self._open_guesses if key[0] != layer and layer is not None}
        for key, pending in self._guesses.items():
            if key in used:
                self.reader.promote(pending)
            elif self.reader.cancel(pending) and self.layers[key[0]].states[key[1]] == READING:
                self.prefetcher.stats.cancelled += 1
                self._release(key)
        self._guesses.clear()

    def paging(self) -> PagingStats:
        """The metrics of cache and disk."""
        reads = self.reader.stats
        bytes_before, seconds_before = self._preloaded
        return PagingStats(
            self.capacity,
            self.stats.hits,
            self.stats.misses,
            reads.bytes - bytes_before,
            reads.busy_seconds - seconds_before,
            bytes_used=self.stats.bytes_used,
            waited_seconds=self.stats.waited_seconds,
        )

    def begin_with(self, usage: ExpertUsage, seconds: float = PRELOAD_SECONDS) -> None:
        """Let the policy know what earlier runs used, and read their most used experts for so many seconds at most."""
        self.policy.prime(usage)
        experts = usage.shares_LE.shape[1]
        order = np.argsort(-usage.shares_LE, axis=None, kind="stable")[: len(self._free)]
        hottest = [divmod(int(at), experts) for at in order if usage.shares_LE.flat[at] > 0]
        deadline = time.monotonic() + seconds
        for at in range(0, len(hottest), PRELOAD_AT_ONCE):
            batch = hottest[at : at + PRELOAD_AT_ONCE]
            if time.monotonic() > deadline:
                break
            for key in batch:
                self._read(key, self._free.pop())
            for key in batch:
                self.wait_for_any(key)
                if self.layers[key[0]].states[key[1]] == FAILED:  # reported where it is needed
                    self._errors.pop(key, None)
                    self._release(key)
        self._preloaded = self.reader.stats.bytes, self.reader.stats.busy_seconds

    def weights(self, layer: int, expert: int) -> tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]:
        """Gate, up and down of one expert, read now if they are not in memory; valid until the next call."""
        if self.layers[layer].states[expert] != PRESENT:
            start = time.perf_counter()
            self._load(layer, [expert], [expert])
            self.wait(layer, [expert])
            self.stats.waited_seconds += time.perf_counter() - start
        key = layer, expert
        return self.memory.weights(key, self._slots[key])

    def use(self, layer: int, expert_ids_TK: Tensor) -> None:
        """Tell the policy what tokens choose, before it is loaded."""
        if not self.holds_all:
            self.policy.use(layer, expert_ids_TK.numpy())

    def record(self, layer: int, expert_ids_TK: Tensor) -> None:
        """Count the use of experts that were all in memory; some may have left it for those of a later layer."""
        chosen = chosen_experts(expert_ids_TK)
        self._resolve_guesses(layer, chosen)
        self.stats.hits += len(chosen)
        self.stats.bytes_used += len(chosen) * self.sources.layers[layer].expert_bytes
        self.use(layer, expert_ids_TK)

    def wait(self, layer: int, experts: Sequence[int]) -> None:
        """Until they have been read. SoliError where one could not be; it is missing again then."""
        states = self.layers[layer].states
        with self._arrived:
            while any(states[expert] == READING for expert in experts):
                self._arrived.wait()
        for expert in experts:
            if states[expert] == FAILED:
                key = layer, expert
                error = self._errors.pop(key)
                self._release(key)
                raise error

    def wait_for_any(self, key: Key) -> None:
        """Until an expert is not being read, whatever came of it."""
        states = self.layers[key[0]].states
        with self._arrived:
            while states[key[1]] == READING:
                self._arrived.wait()

    def close(self) -> None:
        """Ends the threads that read."""
        self.reader.close()

    def _parts(self, layer: int, chosen: Sequence[int]) -> list[Sequence[int]]:
        """The chosen experts in parts of which two fit in memory at once, or in one part where all fit.

        A prompt chooses nearly all experts of a layer, most of them for the last time: in parts of half of the layer's
        share of the cache they take the place of each other, and not of those that other layers need again.
        """
        experts = len(self.sources.layers[layer].experts)
        share = self.capacity // len(self.sources.layers)
        fits = len(chosen) <= self.capacity
        if fits and (self.holds_all or len(chosen) <= max(share, experts * PROMPT_SHARE)):
            return [chosen]
        size = max(1, min(self.capacity // 2, max(share // 2, experts // MOST_PARTS)))
        return [chosen[at : at + size] for at in range(0, len(chosen), size)]

    def _load(self, layer: int, experts: Sequence[int], locked: Sequence[int], is_prompt: bool = False) -> None:
        """Have experts in memory or on their way; those of `locked` stay. A prompt uses all after these, in order."""
        states = self.layers[layer].states
        self._locked = {(layer, expert) for expert in locked}
        self._needed_from = (layer, locked[-1] + 1) if is_prompt else None
        self.stats.bytes_used += len(experts) * self.sources.layers[layer].expert_bytes
        for expert in experts:
            if states[expert] == FAILED:  # of an earlier pass
                self._errors.pop((layer, expert), None)
                self._release((layer, expert))
            if states[expert] == MISSING:
                self.stats.misses += 1
                if self.recorded_states_E is not None:
                    self.recorded_states_E[expert] = MISSING
                slot = self._take_slot(layer)
                assert slot is not None
                self._read((layer, expert), slot)
            else:
                self.stats.hits += 1

    def _read(self, key: Key, slot: int, needed: bool = True) -> Pending:
        layer, expert = key
        self._slots[key] = slot
        self.policy.add(key)
        if self._poison:
            self.memory.poison(slot)
        self.layers[layer].states[expert] = READING
        reads = self.sources.layers[layer].experts[expert].reads
        return self.reader.submit(reads, self.memory.view(slot), partial(self._arrive, key), needed)

    def _take_slot(self, layer: int, wait: bool = True) -> int | None:
        """A free slot, or that of an expert that leaves. Without `wait`, None where all that may leave are being read
        or will be used in this pass."""
        if self._free:
            return self._free.pop()
        while True:
            reading = 0
            for key in self.policy.candidates(layer, self._needed_from):
                if key in self._locked:
                    continue
                if not wait and self._needed_from is not None and key >= self._needed_from:
                    return None
                with self._arrived:
                    state = self.layers[key[0]].states[key[1]]
                if state != READING:
                    self.stats.evictions += 1
                    self._errors.pop(key, None)
                    return self._release(key, to_free=False)
                reading += 1
            if not wait:
                return None
            assert reading, "every slot is in use"
            with self._arrived:
                self._arrived.wait(timeout=0.1)

    def _release(self, key: Key, to_free: bool = True) -> int:
        """Take an expert out of the table; its slot."""
        slot = self._slots.pop(key)
        self.policy.remove(key)
        self.layers[key[0]].states[key[1]] = MISSING
        if to_free:
            self._free.append(slot)
        return slot

    def _arrive(self, key: Key, error: Exception | None) -> None:
        """On the thread that finished an expert's last read: check it, and enter its addresses."""
        layer, expert = key
        experts = self.layers[layer]
        if error is None:
            try:
                experts.set_addresses(expert, self.memory.prepare(key, self._slots[key]))
            except Exception as failure:
                error = failure
        with self._arrived:
            if error is not None:
                self._errors[key] = error
            experts.states[expert] = PRESENT if error is None else FAILED
            self._arrived.notify_all()
