"""Trap 1: experts outside the selected groups are masked with -inf: with negative biases a 0 would rank first."""

import torch

from tests.traps.routers import make_router


def test_a_masked_expert_ranks_below_every_negative_biased_score() -> None:
    router = make_router(experts=8, groups=4, selected_groups=1, experts_per_token=2)
    # Every biased score is negative, so a mask of 0 would rank every masked expert first.
    router.e_score_correction_bias.copy_(torch.tensor([-1.0, -1.0, -3.0, -3.0, -3.0, -3.0, -3.0, -3.0]))
    routing = router(torch.randn(16, router.weight.shape[1], generator=torch.Generator().manual_seed(0)))
    assert (routing.biased_TE < 0).all()
    assert routing.groups_TG[:, 0].all() and not routing.groups_TG[:, 1:].any()
    assert set(routing.expert_ids_TK.flatten().tolist()) == {0, 1}
