"""Trap 2: a group's score is the sum of its two highest biased scores; gate weights come from the unbiased sigmoid, are
normalised (+1e-20), then scaled.
"""

import math

import torch

from tests.traps.routers import literal_selection, make_router


def test_selection_and_gates_equal_a_literal_transcription() -> None:
    router = make_router(experts=16, groups=4, selected_groups=2, experts_per_token=4, routed_scaling_factor=2.5)
    generator = torch.Generator().manual_seed(2)
    router.e_score_correction_bias.normal_(0.0, 0.5, generator=generator)
    x_TD = torch.randn(64, 8, generator=generator)
    routing = router(x_TD)
    bias = router.e_score_correction_bias.tolist()
    for t, x in enumerate(x_TD.double()):
        affinity = [1 / (1 + math.exp(-float(w.double() @ x))) for w in router.weight.detach()]
        selected = literal_selection(affinity, bias, groups=4, selected_groups=2, experts_per_token=4)
        assert routing.expert_ids_TK[t].tolist() == selected
        total = sum(affinity[e] for e in selected) + 1e-20
        expected = torch.tensor([2.5 * affinity[e] / total for e in selected])
        torch.testing.assert_close(routing.weights_TK[t], expected, rtol=1e-5, atol=1e-7)


def test_two_high_scores_beat_the_single_highest() -> None:
    router = make_router(experts=8, groups=4, selected_groups=1, experts_per_token=2)
    with torch.no_grad():
        router.weight.zero_()  # every affinity is 0.5: the bias alone decides
    router.e_score_correction_bias.copy_(torch.tensor([0.9, 0.0, 0.6, 0.6, 0.0, 0.0, 0.0, 0.0]))
    routing = router(torch.randn(3, 8))
    assert [sorted(ids) for ids in routing.expert_ids_TK.tolist()] == [[2, 3]] * 3


def test_a_common_bias_changes_neither_selection_nor_gates() -> None:
    router = make_router(experts=8, groups=1, selected_groups=1, experts_per_token=2)
    x_TD = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    before = router(x_TD)
    router.e_score_correction_bias.fill_(4.0)  # the same for all experts
    after = router(x_TD)
    assert torch.equal(before.expert_ids_TK, after.expert_ids_TK)
    assert torch.equal(before.weights_TK, after.weights_TK)
