"""Trap 1: experts outside the chosen groups are masked with -inf, not 0: a negative bias would let a 0 win."""

import torch

from tests.traps.routers import make_router


def test_a_masked_expert_never_wins_over_a_negative_biased_score() -> None:
    router = make_router(experts=8, groups=4, kept=1, chosen=2)
    # Every biased score is negative, so a mask of 0 would rank every masked expert first.
    router.e_score_correction_bias.copy_(torch.tensor([-1.0, -1.0, -3.0, -3.0, -3.0, -3.0, -3.0, -3.0]))
    routing = router(torch.randn(16, router.weight.shape[1], generator=torch.Generator().manual_seed(0)))
    assert (routing.biased_TE < 0).all()
    assert routing.groups_TG[:, 0].all() and not routing.groups_TG[:, 1:].any()
    assert set(routing.expert_ids_TK.flatten().tolist()) == {0, 1}
