"""The latent cache: slot equals position, it grows without forgetting, and rows can leave."""

import pytest
import torch

from soli.engine.cache import LatentCache
from soli.errors import SoliError


def test_slots_are_positions_whatever_the_order_of_arrival():
    cache = LatentCache(512)
    latent_BTC, rope_BTR = torch.randn(2, 3, 4), torch.randn(2, 3, 2)
    positions_BT = torch.tensor([[0, 1, 2], [70, 71, 300]])
    latent_BSC, rope_BSR = cache.append(5, latent_BTC, rope_BTR, positions_BT)
    assert latent_BSC.shape == (2, 301, 4) and rope_BSR.shape == (2, 301, 2)
    assert torch.equal(latent_BSC[0, :3], latent_BTC[0]) and torch.equal(rope_BSR[1, [70, 71, 300]], rope_BTR[1])
    assert not latent_BSC[0, 3:].any(), "slots nobody wrote must hold zeros, never stale or undefined memory"


def test_growing_keeps_what_was_there_and_layers_apart():
    cache = LatentCache(200)
    written = torch.randn(1, 200, 4)
    for at in range(200):
        position = torch.tensor([[at]])
        latent_BSC, _ = cache.append(0, written[:, at : at + 1], torch.zeros(1, 1, 2), position)
        cache.append(1, -written[:, at : at + 1], torch.zeros(1, 1, 2), position)
    assert torch.equal(latent_BSC, written)
    assert cache.nbytes() == 2 * 200 * (4 + 2) * 4


def test_keep_drops_and_reorders_rows():
    cache = LatentCache(8)
    latent_BTC = torch.arange(3.0)[:, None, None].expand(3, 1, 4)
    first = torch.zeros(3, 1, dtype=torch.int64)
    cache.append(0, latent_BTC, torch.zeros(3, 1, 2), first)
    cache.keep(torch.tensor([2, 0]))
    latent_BSC, _ = cache.append(0, torch.full((2, 1, 4), 9.0), torch.zeros(2, 1, 2), first[:2] + 1)
    assert latent_BSC[:, :, 0].tolist() == [[2.0, 9.0], [0.0, 9.0]]


def test_a_position_past_the_end_is_refused():
    with pytest.raises(SoliError, match="position 8 is past the 8 positions"):
        LatentCache(8).append(0, torch.zeros(1, 1, 4), torch.zeros(1, 1, 2), torch.tensor([[8]]))
