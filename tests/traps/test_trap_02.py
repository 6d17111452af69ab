"""Trap 2: a group counts by its two highest biased scores; gates are unbiased, normalised (+1e-20), then scaled."""

import math

import torch

from tests.traps.routers import literal_choice, make_router


def test_choice_and_gates_follow_a_literal_transcription() -> None:
    router = make_router(experts=16, groups=4, kept=2, chosen=4, routed_scaling_factor=2.5)
    generator = torch.Generator().manual_seed(2)
    router.e_score_correction_bias.normal_(0.0, 0.5, generator=generator)
    x_TD = torch.randn(64, 8, generator=generator)
    routing = router(x_TD)
    bias = router.e_score_correction_bias.tolist()
    for t, x in enumerate(x_TD.double()):
        affinity = [1 / (1 + math.exp(-float(w.double() @ x))) for w in router.weight.detach()]
        chosen = literal_choice(affinity, bias, groups=4, kept=2, chosen=4)
        assert routing.expert_ids_TK[t].tolist() == chosen
        whole = sum(affinity[e] for e in chosen) + 1e-20
        expected = torch.tensor([2.5 * affinity[e] / whole for e in chosen])
        torch.testing.assert_close(routing.weights_TK[t], expected, rtol=1e-5, atol=1e-7)


def test_two_good_experts_beat_one_best() -> None:
    router = make_router(experts=8, groups=4, kept=1, chosen=2)
    with torch.no_grad():
        router.weight.zero_()  # every affinity is 0.5: the bias alone decides
    router.e_score_correction_bias.copy_(torch.tensor([0.9, 0.0, 0.6, 0.6, 0.0, 0.0, 0.0, 0.0]))
    routing = router(torch.randn(3, 8))
    assert [sorted(ids) for ids in routing.expert_ids_TK.tolist()] == [[2, 3]] * 3


def test_the_bias_moves_the_choice_but_not_the_gate() -> None:
    router = make_router(experts=8, groups=1, kept=1, chosen=2)
    x_TD = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    before = router(x_TD)
    router.e_score_correction_bias.fill_(4.0)  # the same for all: no choice changes
    after = router(x_TD)
    assert torch.equal(before.expert_ids_TK, after.expert_ids_TK)
    assert torch.equal(before.weights_TK, after.weights_TK)
