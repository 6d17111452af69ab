"""The order of the data depends only on the seed and the position."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soli.errors import SoliError
from soli.train.batches import Batches, PackedTokens, heldout_windows, rank_slice


def packed(folder, count=1000, **meta):
    np.arange(count, dtype="<u2").tofile(folder / "train.bin")
    np.arange(20, dtype="<u2").tofile(folder / "valid.bin")
    sizes = {"dtype": "uint16", "train_tokens": count, "valid_tokens": 20}
    (folder / "meta.json").write_text(json.dumps(sizes | meta))
    return PackedTokens(folder, "train")


def test_any_split_of_positions_gives_the_same_windows(tmp_path):
    whole = Batches(packed(tmp_path), 16, 2, seed=3).take(0, 150)
    other = Batches(PackedTokens(tmp_path, "train"), 16, 2, seed=3)
    assert torch.equal(whole[140:], other.take(140, 10))  # read first: the order does not depend on earlier reads
    assert torch.equal(whole[:70], torch.cat([other.take(n, 7) for n in range(0, 70, 7)]))


@given(position=st.integers(0, 400), count=st.integers(0, 40), world=st.integers(1, 50))
def test_ranks_see_the_sequence_of_one_rank(position, count, world):
    shares = [rank_slice(position, count, rank, world) for rank in range(world)]
    assert max(size for _, size in shares) - min(size for _, size in shares) <= 1
    assert [n for begin, size in shares for n in range(begin, begin + size)] == list(range(position, position + count))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_any_number_of_ranks_takes_the_same_windows(tmp_path, world):
    whole = Batches(packed(tmp_path), 16, 2, seed=3).take(50, 20)  # across the end of an epoch
    ranks = [Batches(PackedTokens(tmp_path, "train"), 16, 2, seed=3) for _ in range(world)]
    assert torch.equal(
        whole, torch.cat([batches.take(*rank_slice(50, 20, rank, world)) for rank, batches in enumerate(ranks)])
    )


def test_windows_are_contiguous_in_the_file_and_an_epoch_predicts_each_target_once(tmp_path):
    batches = Batches(packed(tmp_path), 16, 2, seed=3)
    epoch = batches.take(0, batches.per_epoch)
    assert torch.equal(epoch, epoch[:, :1] + torch.arange(18))
    targets = epoch[:, 1:17].flatten()
    assert targets.unique().numel() == targets.numel() >= 1000 - 2 * 18 - 16


def test_epochs_and_seeds_differ(tmp_path):
    batches = Batches(packed(tmp_path), 16, 2, seed=3)
    first, second = batches.take(0, 20), batches.take(batches.per_epoch, 20)
    assert not torch.equal(first, second)
    assert not torch.equal(first, Batches(PackedTokens(tmp_path, "train"), 16, 2, seed=4).take(0, 20))


def test_heldout_windows_are_spread_over_the_file(tmp_path):
    windows = heldout_windows(packed(tmp_path), 16, 2, budget=64)
    assert windows.shape == (4, 18) and windows[0, 0] == 0 and windows[-1, 0] > 900


@pytest.mark.parametrize(
    ("meta", "words"), [({"train_tokens": 5}, "1,000 tokens, not 5"), ({"dtype": "text"}, "meta.json is damaged")]
)
def test_files_that_disagree_are_rejected(tmp_path, meta, words):
    with pytest.raises(SoliError, match=words):
        packed(tmp_path, **meta)


def test_missing_data_says_how_to_build_it(tmp_path):
    with pytest.raises(SoliError, match="soli data build"):
        PackedTokens(tmp_path, "train")


def test_too_short_a_corpus_is_refused(tmp_path):
    with pytest.raises(SoliError, match="too few"):
        Batches(packed(tmp_path, 30), 16, 2, seed=0)
