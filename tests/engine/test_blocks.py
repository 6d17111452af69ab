"""The page pool: no page is lost or given twice, and what is found is what was published."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from soli.engine.blocks import BlockManager, block_key

PAGES = 5


class Pool(RuleBasedStateMachine):
    """A model of the pool: who owns what, and which content each page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockManager(PAGES)
        self.owned: list[int] = []  # a page once per owner
        self.holds: dict[int, bytes] = {}

    @rule()
    def take(self) -> None:
        page = self.pool.take()
        if page is None:
            assert set(self.owned) == set(range(PAGES)), "a page without an owner was not given"
            return
        assert page not in self.owned, "a page that somebody owns was given away"
        self.owned.append(page)
        self.holds.pop(page, None)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), content=st.integers(0, 3))
    def publish(self, data: st.DataObject, content: int) -> None:
        page = data.draw(st.sampled_from(self.owned))
        if page in self.holds:
            return
        key = block_key(b"", [content])
        self.pool.publish(page, key)
        if key not in self.holds.values():
            self.holds[page] = key

    @rule(content=st.integers(0, 3))
    def find(self, content: int) -> None:
        key = block_key(b"", [content])
        page = self.pool.find(key)
        if page is None:
            assert key not in self.holds.values()
            return
        assert self.holds[page] == key
        self.owned.append(page)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.owned))
        self.owned.remove(page)
        self.pool.release(page)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.holds.clear()

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.used == len(set(self.owned))
        assert self.pool.available == PAGES - len(set(self.owned))
        unowned = [key for page, key in self.holds.items() if page not in self.owned]
        assert self.pool.kept([block_key(b"", [content]) for content in range(4)]) == len(unowned)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_longest_unused_page_goes_first() -> None:
    pool, keys = BlockManager(3), [block_key(b"", [n]) for n in range(3)]
    pages = [pool.take() for _ in range(3)]
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    for page in pages:
        pool.release(page)
    pool.release(pool.find(keys[0]))  # used again, so the second is now the oldest
    assert pool.take() == pages[1]
    assert pool.find(keys[1]) is None and pool.find(keys[0]) == pages[0]


def test_a_key_stands_for_everything_before_it() -> None:
    first, other = block_key(b"", [1, 2]), block_key(b"", [2, 1])
    assert block_key(first, [3, 4]) != block_key(other, [3, 4]) != block_key(b"", [1, 2, 3, 4])
    assert block_key(b"mute", [1, 2]) != first == block_key(b"", (1, 2))
