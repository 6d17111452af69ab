"""The latent cache: a step addresses the slots of its tokens, and writes them; no block is lost or allocated twice, and
what is found under a key is what was registered."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from soli.config import preset
from soli.engine.latent_cache import BlockManager, LatentCache, block_key, blocks_for, bytes_per_token
from soli.errors import SoliError

BLOCKS = 5


def test_slots_follow_the_block_tables():
    cache = LatentCache(block_count=8, block_size=4, rows=2, positions=12)
    cache.block_tables_RM[0], cache.block_tables_RM[1] = [5, 0, 7], [2, 6, 1]
    step = cache.step(rows=[1, 0], starts=[6, 2], counts=[1, 7])
    assert step.positions_T.tolist() == [6, 2, 3, 4, 5, 6, 7, 8]
    assert step.slots_T.tolist() == [26, 22, 23, 0, 1, 2, 3, 28]
    assert step.num_decode_tokens == 1 and step.table_BM.tolist() == [[2, 6]] and step.lengths_B.tolist() == [7]
    [chunk] = step.chunks
    assert (chunk.start, chunk.stop, chunk.first) == (1, 8, 2)
    assert chunk.slots_S.tolist() == [20, 21, 22, 23, 0, 1, 2, 3, 28]


def test_entries_are_written_to_their_slots_and_layers_are_separate():
    cache = LatentCache(block_count=4, block_size=2, rows=1, positions=8)
    cache.block_tables_RM[0] = [3, 1, 0, 2]
    entries_TX = torch.arange(15.0).view(5, 3)
    kv_PSX = cache.step([0], [0], [5]).write(0, entries_TX)
    other_PSX = cache.step([0], [0], [5]).write(1, -entries_TX)
    assert torch.equal(kv_PSX[3], entries_TX[:2]) and torch.equal(kv_PSX[0, 0], entries_TX[4])
    cache.step([0], [5], [1]).write(0, torch.full((1, 3), 9.0))
    assert kv_PSX[0, 1].tolist() == [9.0] * 3 and torch.equal(kv_PSX[1], entries_TX[2:4])
    assert torch.equal(other_PSX[3], -entries_TX[:2])
    assert cache.nbytes() == 2 * 4 * 2 * 3 * 4


def test_whole_rows_have_separate_blocks():
    cache = LatentCache.whole_rows([5, 1, 8], block_size=4)
    assert cache.block_count == 5 and cache.block_tables_RM.tolist() == [[0, 1], [2, 0], [3, 4]]


def test_a_position_past_the_end_is_rejected():
    cache = LatentCache.whole_rows([8])
    cache.step([0], [7], [1])
    with pytest.raises(SoliError, match="position 8 is past the 8 positions"):
        cache.step([0], [8], [1])


def test_sizes():
    assert [blocks_for(tokens, 4) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert bytes_per_token(preset("deepseek-v3"), 61, torch.bfloat16) == 61 * 576 * 2


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
