"""The scheduler over random arrivals, cancellations and budgets: no page leaks, none is given twice, nobody starves.

No model: a step "reads" what was planned and draws a token from a small alphabet, so that prefixes are often shared.
What a page should hold is kept beside the scheduler, written as a model would write it, and compared when it is found.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from soli.engine.blocks import BlockManager
from soli.engine.latent_cache import LatentCache, blocks_for
from soli.engine.request import EngineLimits, Request
from soli.engine.scheduler import Scheduler, Task

SIZE = 2  # tokens a page
POSITIONS = 24


class Serving(RuleBasedStateMachine):
    """Requests come, are read, answered and cancelled, as the engine would do it."""

    @initialize(
        pages=st.integers(blocks_for(POSITIONS, SIZE), 30),
        running=st.integers(1, 5),
        step=st.integers(5, 14),
        sharing=st.booleans(),
        drafting=st.booleans(),
    )
    def begin(self, pages: int, running: int, step: int, sharing: bool, drafting: bool) -> None:
        self.limits = EngineLimits(
            cache_bytes=1, max_running=running, tokens_per_step=step, block_size=SIZE, prefix_sharing=sharing
        )
        self.pool, self.drafting = BlockManager(pages), drafting
        self.cache = LatentCache(pages, SIZE, running, POSITIONS)
        self.scheduler = Scheduler(self.cache, self.pool, self.limits, drafting)
        self.alive: list[Task] = []
        self.slots: dict[int, tuple[int, ...]] = {}  # what was written where: all tokens up to and with its own
        self.number = 0
        self.idle = 0

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        prompt = tuple(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=POSITIONS - 2)))
        new = data.draw(st.integers(1, POSITIONS - len(prompt)))
        task = Task(self.number, Request(prompt, new, trace=data.draw(st.booleans())), list(prompt))
        self.number += 1
        self.alive.append(task)
        self.scheduler.waiting.append(task)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.alive))
        self.alive.remove(task)
        self.scheduler.remove(task)

    @rule(seed=st.integers(0, 2**20))
    def step(self, seed: int) -> None:
        luck = random.Random(seed)
        oldest = min(self.alive, key=lambda task: task.number, default=None)
        before = None if oldest is None else (len(oldest.ids), oldest.read)
        reads = self.scheduler.plan()
        assert sum(read.count for read in reads) <= self.limits.tokens_per_step
        assert len({read.task for read in reads}) == len(reads) and all(read.count > 0 for read in reads)
        if oldest is not None:
            assert any(read.task is oldest for read in reads), "the oldest request had to wait"
        for read in reads:
            self._read(read.task, read.start, read.tokens)
        for read in reads:
            self._answer(read.task, read.count, read.last, luck)
        if oldest in self.alive:
            assert (len(oldest.ids), oldest.read) > before

    def _slot(self, task: Task, position: int) -> int:
        return task.pages[position // SIZE] * SIZE + position % SIZE

    def _read(self, task: Task, start: int, tokens: list[int]) -> None:
        text = [*task.ids[:start], *tokens]
        for position in range(start):
            assert self.slots[self._slot(task, position)] == tuple(text[: position + 1]), "another text's latents"
        for position in range(start, len(text)):
            self.slots[self._slot(task, position)] = tuple(text[: position + 1])

    def _answer(self, task: Task, count: int, last: bool, luck: random.Random) -> None:
        drafts, stays = task.drafts, count
        if last:
            kept = bool(drafts) and luck.random() < 0.5
            new = [*drafts, luck.randint(0, 1)] if kept else [luck.choice([0, 1])]
            stays -= len(drafts) if not kept else 0
            task.drafts = []
        self.scheduler.advance(task, stays)
        if last:
            room = len(task.request.prompt_ids) + task.request.max_new_tokens - len(task.ids)
            task.ids += new[:room]
            if room <= len(new):
                self.alive.remove(task)
                self.scheduler.remove(task)
                return
            if self.drafting and room - len(new) > 1:
                task.drafts = [luck.randint(0, 1)]
        self.scheduler.publish(task)

    @invariant()
    def pages_are_where_they_should_be(self) -> None:
        if not hasattr(self, "pool"):
            return
        running = self.scheduler.running
        owned = {page for task in running for page in task.pages}
        assert self.pool.used == len(owned) and self.pool.available == self.pool.pages - len(owned)
        assert sorted(running, key=lambda task: task.number) == running
        assert len({task.row for task in running}) == len(running) <= self.limits.max_running
        for task in running:
            assert self.cache.tables_RM[task.row, : len(task.pages)].tolist() == task.pages
            assert len(task.pages) >= blocks_for(task.read, SIZE)
        assert set(self.alive) == {*running, *self.scheduler.waiting}
        assert all(task.row == -1 and not task.pages for task in self.scheduler.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        luck, steps = random.Random(0), 0
        while self.alive:
            self.step(luck.randrange(2**20))
            steps += 1
            assert steps < 2000, "it does not come to an end"
        assert self.pool.used == 0


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.slow
def test_serving_at_length() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Serving, settings=settings(max_examples=3000, stateful_step_count=60, deadline=None))


@given(st.integers(1, 20), st.integers(0, 3), st.integers(1, 20))
def test_drafts_and_the_token_before_them_are_read_together(tokens: int, drafts: int, budget: int) -> None:
    from soli.engine.scheduler import _portion

    task = Task(0, Request((0,) * tokens, 9), [0] * tokens, [1] * drafts)
    count = _portion(task, budget)
    assert 0 <= count <= min(budget, tokens + drafts)
    assert count == tokens + drafts or count <= tokens - 1 or drafts == 0
