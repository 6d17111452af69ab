"""Trap 3: the router's product, sigmoid and bias are float32; a bfloat16 bias near 5 cannot move by 0.001."""

import torch

from tests.model.oracle import draw_config, make_model
from tests.traps.routers import make_router


def test_everything_is_float32_under_bfloat16_activations() -> None:
    router = make_router(experts=8, groups=1, selected_groups=1, experts_per_token=2).to(torch.bfloat16)
    routing = router(torch.randn(4, 8, dtype=torch.bfloat16))
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32
    assert {routing.scores_TE.dtype, routing.biased_TE.dtype, routing.weights_TK.dtype} == {torch.float32}


def test_logits_are_not_rounded_to_bfloat16() -> None:
    router = make_router(experts=8, groups=1, selected_groups=1, experts_per_token=2).to(torch.bfloat16)
    x_TD = torch.randn(32, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(4))
    exact = (x_TD.double() @ router.weight.double().T).sigmoid()
    assert (router(x_TD).scores_TE.double() - exact).abs().max() < 1e-6


def test_a_bias_near_five_moves_by_a_thousandth_after_a_cast_of_the_model() -> None:
    model = make_model(draw_config(0, n_routed_experts=8))
    _, moe = next(iter(model.moe_layers()))
    moe.gate.e_score_correction_bias.fill_(5.0)
    model.to(torch.bfloat16)
    moe.gate.e_score_correction_bias += 0.001
    assert float(moe.gate.e_score_correction_bias[0]) > 5.0009
    assert torch.tensor(5.0, dtype=torch.bfloat16) + 0.001 == 5.0  # in bfloat16 it does not move
