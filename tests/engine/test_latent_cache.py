"""The latent cache: a step addresses the slots of its tokens, and writes them."""

import pytest
import torch

from soli.config import preset
from soli.engine.latent_cache import LatentCache, blocks_for, bytes_per_token
from soli.errors import SoliError


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
