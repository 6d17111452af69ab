"""The scheduler over random arrivals, cancellations and budgets: no block leaks, none is allocated twice, no request
starves.

No model: a step "computes" what was scheduled and samples from a small alphabet, so that prefixes are often shared.
What a block should contain is recorded beside the scheduler, as a model would write it, and compared when it is used.
"""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from soli.engine.detokenizer import ByteText, TextStream
from soli.engine.latent_cache import BlockManager, LatentCache, blocks_for
from soli.engine.request import EngineLimits, Request
from soli.engine.sampler import GREEDY, Distribution, Draft, SamplerState
from soli.engine.scheduler import Scheduler, SequenceState

SIZE = 2  # tokens a block
POSITIONS = 24


def sequence_of(request_id: int, request: Request) -> SequenceState:
    sampler, stream = SamplerState(GREEDY, request.prompt_ids, 2), TextStream(ByteText(lambda token: b""))
    return SequenceState(request_id, request, [*request.prompt_ids], sampler, stream)


def drafts_of(tokens: list[int]) -> list[Draft]:
    return [Draft(token, Distribution(np.array([token]), np.ones(1))) for token in tokens]


class Serving(RuleBasedStateMachine):
    """Requests arrive, are computed, answered and cancelled, as the engine does it."""

    @initialize(
        blocks=st.integers(blocks_for(POSITIONS, SIZE), 30),
        running=st.integers(1, 5),
        step=st.integers(5, 14),
        sharing=st.booleans(),
        drafting=st.booleans(),
    )
    def begin(self, blocks: int, running: int, step: int, sharing: bool, drafting: bool) -> None:
        self.limits = EngineLimits(
            cache_bytes=1, max_running=running, tokens_per_step=step, block_size=SIZE, prefix_sharing=sharing,
            speculate=drafting,
        )  # fmt: skip
        self.manager, self.drafting = BlockManager(blocks), drafting
        self.cache = LatentCache(blocks, SIZE, running, POSITIONS)
        self.scheduler = Scheduler(self.cache, self.manager, self.limits)
        self.alive: list[SequenceState] = []
        self.slots: dict[int, tuple[int, ...]] = {}  # what was written where: all tokens up to and with its own
        self.next_id = 0
        self.idle = 0

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        prompt = tuple(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=POSITIONS - 2)))
        new = data.draw(st.integers(1, POSITIONS - len(prompt)))
        sequence = sequence_of(self.next_id, Request(prompt, new, trace=data.draw(st.booleans())))
        self.next_id += 1
        self.alive.append(sequence)
        self.scheduler.waiting.append(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.alive))
        self.alive.remove(sequence)
        self.scheduler.remove(sequence)

    @rule(seed=st.integers(0, 2**20))
    def step(self, seed: int) -> None:
        luck = random.Random(seed)
        oldest = min(self.alive, key=lambda sequence: sequence.request_id, default=None)
        before = None if oldest is None else (len(oldest.ids), oldest.computed)
        parts = self.scheduler.schedule()
        assert sum(part.count for part in parts) <= self.limits.tokens_per_step
        assert len({part.sequence for part in parts}) == len(parts) and all(part.count > 0 for part in parts)
        assert [part.row for part in parts] == [sum(part.count for part in parts[:n]) for n in range(len(parts))]
        if oldest is not None:
            assert any(part.sequence is oldest for part in parts), "the oldest request had to wait"
        for part in parts:
            self._read(part.sequence, part.start, part.tokens)
        for part in parts:
            self._answer(part.sequence, part.count, part.is_last, luck)
        if oldest in self.alive:
            assert (len(oldest.ids), oldest.computed) > before

    def _slot(self, sequence: SequenceState, position: int) -> int:
        return sequence.blocks[position // SIZE] * SIZE + position % SIZE

    def _read(self, sequence: SequenceState, start: int, tokens: list[int]) -> None:
        text = [*sequence.ids[:start], *tokens]
        for position in range(start):
            assert self.slots[self._slot(sequence, position)] == tuple(text[: position + 1]), "another text's latents"
        for position in range(start, len(text)):
            self.slots[self._slot(sequence, position)] = tuple(text[: position + 1])

    def _answer(self, sequence: SequenceState, count: int, last: bool, luck: random.Random) -> None:
        drafts, computed = [draft.token for draft in sequence.drafts], count
        if last:
            accepted = bool(drafts) and luck.random() < 0.5
            new = [*drafts, luck.randint(0, 1)] if accepted else [luck.choice([0, 1])]
            computed -= len(drafts) if not accepted else 0
            sequence.drafts = []
        sequence.computed += computed
        if last:
            remaining = len(sequence.request.prompt_ids) + sequence.request.max_new_tokens - len(sequence.ids)
            sequence.ids += new[:remaining]
            if remaining <= len(new):
                self.alive.remove(sequence)
                self.scheduler.remove(sequence)
                return
            if self.drafting and remaining - len(new) > 1:
                sequence.drafts = drafts_of([luck.randint(0, 1)])
        self.scheduler.register_full_blocks(sequence)

    @invariant()
    def blocks_are_where_they_should_be(self) -> None:
        if not hasattr(self, "manager"):
            return
        running = self.scheduler.running
        referenced = {block for sequence in running for block in sequence.blocks}
        assert self.manager.used == len(referenced)
        assert self.manager.available == self.manager.block_count - len(referenced)
        assert sorted(running, key=lambda sequence: sequence.request_id) == running
        assert len({sequence.row for sequence in running}) == len(running) <= self.limits.max_running
        for sequence in running:
            assert self.cache.block_tables_RM[sequence.row, : len(sequence.blocks)].tolist() == sequence.blocks
            assert len(sequence.blocks) >= blocks_for(sequence.computed, SIZE)
        assert set(self.alive) == {*running, *self.scheduler.waiting}
        assert all(sequence.row == -1 and not sequence.blocks for sequence in self.scheduler.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        luck, steps = random.Random(0), 0
        while self.alive:
            self.step(luck.randrange(2**20))
            steps += 1
            assert steps < 2000, "it does not come to an end"
        assert self.manager.used == 0


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.slow
def test_serving_at_length() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Serving, settings=settings(max_examples=3000, stateful_step_count=60, deadline=None))


@given(st.integers(1, 20), st.integers(0, 3), st.integers(1, 20))
def test_drafts_and_the_token_before_them_are_in_one_step(tokens: int, drafts: int, budget: int) -> None:
    from soli.engine.scheduler import _token_count

    sequence = sequence_of(0, Request((0,) * tokens, 9))
    sequence.drafts = drafts_of([1] * drafts)
    count = _token_count(sequence, budget)
    assert 0 <= count <= min(budget, tokens + drafts)
    assert count == tokens + drafts or count <= tokens - 1 or drafts == 0
