"""The block manager: no block is lost or allocated twice, and what is found under a key is what was registered."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from soli.engine.blocks import BlockManager, block_key

BLOCKS = 5


class BlockManagerMachine(RuleBasedStateMachine):
    """A model of the manager: the references, and the content of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(BLOCKS)
        self.references: list[int] = []  # a block once per reference
        self.content: dict[int, bytes] = {}

    @rule()
    def allocate(self) -> None:
        block = self.manager.allocate()
        if block is None:
            assert set(self.references) == set(range(BLOCKS)), "a block without a reference was not allocated"
            return
        assert block not in self.references, "a referenced block was allocated again"
        self.references.append(block)
        self.content.pop(block, None)

    @precondition(lambda self: self.references)
    @rule(data=st.data(), content=st.integers(0, 3))
    def register(self, data: st.DataObject, content: int) -> None:
        block = data.draw(st.sampled_from(self.references))
        if block in self.content:
            return
        key = block_key(b"", [content])
        self.manager.register(block, key)
        if key not in self.content.values():
            self.content[block] = key

    @rule(content=st.integers(0, 3))
    def acquire(self, content: int) -> None:
        key = block_key(b"", [content])
        block = self.manager.acquire(key)
        if block is None:
            assert key not in self.content.values()
            return
        assert self.content[block] == key
        self.references.append(block)

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.references))
        self.references.remove(block)
        self.manager.release(block)

    @rule()
    def clear(self) -> None:
        self.manager.clear_prefix_cache()
        self.content.clear()

    @invariant()
    def counts_agree(self) -> None:
        assert self.manager.used == len(set(self.references))
        assert self.manager.available == BLOCKS - len(set(self.references))
        unreferenced = [key for block, key in self.content.items() if block not in self.references]
        assert self.manager.count_evictable([block_key(b"", [content]) for content in range(4)]) == len(unreferenced)


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_block_is_evicted_first() -> None:
    manager, keys = BlockManager(3), [block_key(b"", [n]) for n in range(3)]
    blocks = [manager.allocate() for _ in range(3)]
    for block, key in zip(blocks, keys, strict=True):
        manager.register(block, key)
    for block in blocks:
        manager.release(block)
    manager.release(manager.acquire(keys[0]))  # used again, so the second is step the oldest
    assert manager.allocate() == blocks[1]
    assert manager.acquire(keys[1]) is None and manager.acquire(keys[0]) == blocks[0]


def test_a_key_stands_for_everything_before_it() -> None:
    first, other = block_key(b"", [1, 2]), block_key(b"", [2, 1])
    assert block_key(first, [3, 4]) != block_key(other, [3, 4]) != block_key(b"", [1, 2, 3, 4])
    assert block_key(b"masked", [1, 2]) != first == block_key(b"", (1, 2))
