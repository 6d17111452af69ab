"""Which sequences a step computes, and how many tokens of each: continuous batching over a bounded cache.

Sequences run in the order of their arrival. A step has one token of every sequence that is decoding, then parts of
prompts (chunked prefill) up to `tokens_per_step`, then admits the next that wait, as long as there is a free slot and
their tokens fit into the available KV blocks. Blocks are allocated as tokens need them; when none is left, the youngest
sequence releases its own, goes to the head of the queue and is computed again later (preemption by recomputation). The
oldest can always continue, so every request ends.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from soli.engine.beam_search import Continuation
from soli.engine.detokenizer import TextStream
from soli.engine.latent_cache import MAX_ABSORBED_TOKENS, BlockManager, LatentCache, block_key, blocks_for
from soli.engine.request import EngineLimits, Request, Usage
from soli.engine.sampler import Draft, SamplerState
from soli.model.router import Routing


@dataclass(eq=False)
class SequenceState:
    """A request under way. `ids`: prompt and answer; the first `computed` of them have their latents in the cache.
    `drafts`: guesses at what follows, computed together with the last of `ids`."""

    request_id: int
    request: Request
    ids: list[int]
    sampler: SamplerState
    stream: TextStream
    drafts: list[Draft] = field(default_factory=list)
    computed: int = 0
    cached: int = 0  # tokens of the prompt that the prefix cache held when the sequence first ran
    traced: int = 0  # tokens whose routing is in an event
    scored: int = 0  # tokens of the prompt whose successors' log-probabilities are in an event
    drafted: int = 0
    accepted: int = 0
    row: int = -1  # of the block tables, while it runs
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the full blocks of `ids`, as far as they were needed
    registered: int = 0  # blocks that are in the prefix cache
    has_run: bool = False
    weights_version: int = 0  # of the weights when it was last admitted
    speculates: bool = False  # its blocks have the MTP module's latents too
    log_probability: float = 0.0  # of its new tokens, in a beam search
    routing: list[tuple[Routing, ...]] = field(default_factory=list)  # of its tokens, in a beam search with a trace
    unopened_beams: int = 0  # that will continue from this sequence; each has a slot from its admission on
    unopened_rows: list[int] = field(default_factory=list)  # their slots

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next can be sampled, drafts among them."""
        return len(self.ids) + len(self.drafts) - self.computed

    @property
    def remaining_new_tokens(self) -> int:
        """Tokens that may still be sampled."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens - len(self.ids)

    def stop_speculating(self) -> None:
        """From now on its blocks are those of a text without drafts, as the main model's latents in them are."""
        self.speculates = False
        self.drafts = []
        self.keys = []

    @property
    def usage(self) -> Usage:
        prompt = len(self.request.prompt_ids)
        return Usage(prompt, len(self.ids) - prompt, self.cached, self.drafted, self.accepted)


@dataclass(frozen=True)
class ScheduledTokens:
    """A part of a step: `count` tokens of a sequence from position `start` on, those of `ids` and then the drafts. They
    are the tokens of the step from `row` on."""

    sequence: SequenceState
    start: int
    count: int
    row: int

    @property
    def tokens(self) -> list[int]:
        drafts = [draft.token for draft in self.sequence.drafts]
        return (self.sequence.ids[self.start :] + drafts)[: self.count]

    @property
    def is_last(self) -> bool:
        """Whether nothing remains to compute after it."""
        return self.start + self.count == len(self.sequence.ids) + len(self.sequence.drafts)

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled from its logits."""
        return self.is_last and self.sequence.request.max_new_tokens > 0


class Scheduler:
    """Decides over `cache` and `block_manager`, which nothing else may change."""

    def __init__(self, cache: LatentCache, block_manager: BlockManager, limits: EngineLimits) -> None:
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []  # the oldest first
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        # The MTP module's latent of a token depends on the token after it as well.
        self._lookahead = int(limits.speculate)
        self._weights_version = 0
        self._cache, self._block_manager, self._limits = cache, block_manager, limits
        self._free_rows = list(range(limits.max_running - 1, -1, -1))

    @property
    def free_slots(self) -> int:
        """How many more sequences could run."""
        return len(self._free_rows)

    def forget_latents(self) -> None:
        """The model has changed: latents computed until now are of no use to sequences admitted from now on."""
        self._weights_version += 1
        self._block_manager.clear_prefix_cache()

    def schedule(self) -> list[ScheduledTokens]:
        """The next step, decode tokens before chunks; [] when nothing runs. What was computed of it is added to the
        sequences' `computed`."""
        counts: dict[SequenceState, int] = {}
        budget = self._limits.tokens_per_step
        for sequence in sorted(self.running, key=lambda sequence: sequence.remaining > MAX_ABSORBED_TOKENS):
            if sequence.row >= 0:  # not preempted for one before it
                budget -= self._schedule_tokens(sequence, budget, counts)
        while budget and self._admit():
            count = self._schedule_tokens(self.running[-1], budget, counts)
            if not count:
                break
            budget -= count
        parts = sorted(counts.items(), key=lambda part: part[1] > MAX_ABSORBED_TOKENS)
        rows = accumulate((count for _, count in parts), initial=0)
        return [
            ScheduledTokens(sequence, sequence.computed, count, row)
            for (sequence, count), row in zip(parts, rows, strict=False)
        ]

    def register_full_blocks(self, sequence: SequenceState) -> None:
        """Put the sequence's blocks that are full by now into the prefix cache."""
        if self._limits.prefix_sharing:
            full = min(sequence.computed, len(sequence.ids) - self._lookahead) // self._limits.block_size
            self._extend_keys(sequence, full)
            for index in range(sequence.registered, full):
                self._block_manager.register(sequence.blocks[index], sequence.keys[index])
            sequence.registered = max(sequence.registered, full)

    def remove(self, sequence: SequenceState) -> None:
        """The request has ended: free its slot and its blocks."""
        if sequence.row >= 0:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def continue_beams(
        self, beams: Sequence[SequenceState], selected: Sequence[Continuation]
    ) -> tuple[list[SequenceState], list[tuple[int, int]]]:
        """The beams that `selected` makes of `beams`, all those of one request, and blocks to copy, from and to, before
        the next step. The first that continues a beam is that sequence; others copy it."""
        parents = [beams[one.beam] for one in selected]
        unused = [beam for beam in beams if beam not in parents]
        children: list[SequenceState] = []
        copies: list[tuple[int, int]] = []
        for parent in parents:
            child = parent
            if parent in children:
                child = unused.pop() if unused else self._open_beam(beams[0])
                copies += self._copy_sequence(parent, child)
            children.append(child)
        for child, one in zip(children, selected, strict=True):
            child.ids.append(one.token)
            child.log_probability = one.log_probability
        return children, copies

    def _open_beam(self, first: SequenceState) -> SequenceState:
        """A new sequence beside the first one of its request."""
        first.unopened_beams -= 1
        row = first.unopened_rows.pop()
        beam = SequenceState(first.request_id, first.request, [], first.sampler, first.stream, row=row)
        beam.cached, beam.has_run = first.cached, True
        self.running.insert(self.running.index(first) + 1, beam)
        return beam

    def _copy_sequence(self, source: SequenceState, target: SequenceState) -> list[tuple[int, int]]:
        """Make `target` the same text, with shared full blocks; the last block, from and to, if it must be copied. One
        that was preempted, or finds no block, is computed again as far as needed."""
        target.ids = [*source.ids]
        target.keys = [*source.keys]
        target.routing = [*source.routing]
        target.traced = source.traced
        target.weights_version = source.weights_version
        if target.row < 0:
            return []
        full, rest = divmod(source.computed, self._limits.block_size)
        for block in source.blocks[:full]:
            self._block_manager.share(block)
        for block in reversed(target.blocks):
            self._block_manager.release(block)
        target.blocks = []
        for block in source.blocks[:full]:
            self._append_block(target, block)
        target.computed = full * self._limits.block_size
        target.registered = source.registered
        last = self._block_manager.allocate() if rest else None
        if last is None:
            return []
        self._append_block(target, last)
        target.computed = source.computed
        return [(source.blocks[full], last)]

    def _admit(self) -> bool:
        """Run the first that waits, if there is a free slot and its tokens, and the next one, would fit now; for one
        that becomes several beams, there must be a slot and a block of each."""
        if not self.waiting or len(self._free_rows) <= self.waiting[0].unopened_beams:
            return False
        sequence = self.waiting[0]
        if sequence.weights_version != self._weights_version:
            sequence.weights_version = self._weights_version
            sequence.keys = []
        cached_keys = self._cached_prefix(sequence)
        tokens = len(sequence.ids) + len(sequence.drafts) + min(1, sequence.request.max_new_tokens)
        needed = blocks_for(tokens, self._limits.block_size) - len(cached_keys) + sequence.unopened_beams
        if needed > self._block_manager.available - self._block_manager.count_evictable(cached_keys):
            return False
        self.running.append(self.waiting.popleft())
        sequence.row = self._free_rows.pop()
        sequence.unopened_rows = [self._free_rows.pop() for _ in range(sequence.unopened_beams)]
        for key in cached_keys:
            block = self._block_manager.acquire(key)
            assert block is not None
            self._append_block(sequence, block)
        sequence.computed = len(cached_keys) * self._limits.block_size
        sequence.registered = len(cached_keys)
        if not sequence.has_run:
            sequence.cached = sequence.computed
            self.prefix_hit_tokens += sequence.computed
        sequence.has_run = True
        return True

    def _schedule_tokens(self, sequence: SequenceState, budget: int, counts: dict[SequenceState, int]) -> int:
        """How many tokens of a sequence are in the step, with blocks for them: recorded in `counts`, unless it is 0."""
        count = _token_count(sequence, budget)
        if not count or not self._allocate(sequence, count, counts):
            return 0
        counts[sequence] = count
        return count

    def _allocate(self, sequence: SequenceState, count: int, counts: dict[SequenceState, int]) -> bool:
        """Blocks for the next `count` tokens; younger sequences are preempted for them. False if this one had to be."""
        total = blocks_for(sequence.computed + count, self._limits.block_size)
        while len(sequence.blocks) < total:
            block = self._block_manager.allocate()
            if block is not None:
                self._append_block(sequence, block)
                continue
            youngest = self.running[-1]
            self._stop(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            counts.pop(youngest, None)
            if youngest is sequence:
                return False
        return True

    def _append_block(self, sequence: SequenceState, block: int) -> None:
        self._cache.block_tables_RM[sequence.row, len(sequence.blocks)] = block
        sequence.blocks.append(block)

    def _stop(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._free_rows += [*sequence.unopened_rows, sequence.row]
        sequence.unopened_rows = []
        for block in reversed(sequence.blocks):  # the end of a text is of less use to others than its beginning
            self._block_manager.release(block)
        sequence.row = -1
        sequence.computed = sequence.registered = 0
        sequence.blocks = []

    def _cached_prefix(self, sequence: SequenceState) -> list[bytes]:
        """Keys of the full blocks that are in the prefix cache. The last token is always computed, for its logits; of a
        request that wants a trace, or log-probabilities of its prompt, everything is."""
        request = sequence.request
        if request.trace or request.prompt_logprobs is not None or not self._limits.prefix_sharing:
            return []
        full = (len(sequence.ids) - 1) // self._limits.block_size
        self._extend_keys(sequence, full)
        return sequence.keys[: self._block_manager.count_registered(sequence.keys[:full])]

    def _extend_keys(self, sequence: SequenceState, blocks: int) -> None:
        size = self._limits.block_size
        for index in range(len(sequence.keys), blocks):
            parent = sequence.keys[index - 1] if index else _root_key(sequence)
            tokens = sequence.ids[index * size : (index + 1) * size + self._lookahead]
            sequence.keys.append(block_key(parent, tokens))


def _token_count(sequence: SequenceState, budget: int) -> int:
    """How many tokens of a sequence a step computes. The drafts and the last token before them are not separated."""
    count = min(sequence.remaining, budget)
    separated = 0 < sequence.remaining - count <= len(sequence.drafts)
    return sequence.remaining - len(sequence.drafts) - 1 if separated else count


def _root_key(sequence: SequenceState) -> bytes:
    """What the latents of a text depend on besides its tokens: the weights, the masked experts, and whether the MTP
    module has latents of it."""
    masked_experts = np.asarray(sorted(sequence.request.masked_experts), dtype=np.int64)
    return sequence.weights_version.to_bytes(8) + bytes([sequence.speculates]) + masked_experts.tobytes()
