"""Soli against transformers' DeepSeek-V3 and V2, an independent implementation of the same architecture."""

import pytest
import torch
from torch.nn import functional as F

from soli.config import ModelConfig
from soli.model import Transformer
from tests.model.oracle import (
    FAMILY_FIELDS,
    draw_config,
    draw_family_config,
    draw_sparse_config,
    draw_v2_config,
    make_model,
    oracle_name,
    oracle_of,
)

CONFIGS = [pytest.param(draw_config(seed), id=f"v3-{seed}") for seed in range(14)]
CONFIGS += [pytest.param(draw_v2_config(seed), id=f"v2-{seed}") for seed in range(12)]
SPARSE = [
    pytest.param(draw_sparse_config(family, seed), id=f"{family}-{seed}")
    for family in ("deepseek_v32", "glm_moe_dsa")
    for seed in range(12)
]
CONFIGS += SPARSE
CONFIGS += [
    pytest.param(draw_family_config(family, seed), id=f"{family}-{seed}")
    for family in FAMILY_FIELDS
    for seed in range(12)
]


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(seed))


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def test_the_draw_covers_what_it_should() -> None:
    configs: list[ModelConfig] = [draw_config(seed) for seed in range(14)]
    for feature in (
        lambda c: c.q_lora_rank is None,
        lambda c: c.rope_scaling is None,
        lambda c: c.n_group > 1,
        lambda c: c.n_shared_experts > 0,
        lambda c: c.first_k_dense_replace > 0,
        lambda c: c.rope_interleave,
    ):
        assert {bool(feature(c)) for c in configs} == {True, False}


@pytest.mark.parametrize("config", CONFIGS)
def test_logits(config: ModelConfig) -> None:
    model = make_model(config)
    with torch.no_grad():
        assert distance(model(tokens()), oracle_of(model)(tokens()).logits) < 1e-5


@pytest.mark.parametrize("config", CONFIGS)
def test_expert_choices(config: ModelConfig) -> None:
    model = make_model(config)
    oracle, theirs = oracle_of(model), []
    for name, module in oracle.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _module, _args, out: theirs.append(out[1:]))
    with torch.no_grad():
        routing = model.backbone(tokens()).routing
        oracle(tokens())
    assert len(routing) == len(theirs) == config.num_moe_layers
    for ours, (weights, ids) in zip(routing, theirs, strict=True):
        by_id, their_order = ours.expert_ids_TK.argsort(), ids.argsort()
        assert torch.equal(ours.expert_ids_TK.gather(1, by_id), ids.gather(1, their_order))
        torch.testing.assert_close(
            ours.weights_TK.gather(1, by_id), weights.gather(1, their_order), rtol=1e-5, atol=1e-6
        )


def gradients(model: torch.nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients(config: ModelConfig) -> None:
    model = make_model(config)
    oracle = oracle_of(model)
    ours, theirs = gradients(model, model(tokens())), gradients(oracle, oracle(tokens()).logits)
    # With one expert normalised to weight 1 the router's gradient is zero but for rounding: hence a floor.
    floor = 1e-6 * max(float(grad.norm()) for grad in theirs.values())
    for name, grad in ours.items():
        other = theirs[name if name.startswith("lm_head") else f"model.{oracle_name(name)}"]
        assert float((grad - other).norm()) <= 1e-4 * float(other.norm()) + floor, name


def test_the_full_size_model_builds_on_the_meta_device() -> None:
    from soli.config import preset

    model = Transformer(preset("deepseek-v3"), device="meta", dtype=torch.bfloat16)
    main = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    biases = sum(
        moe.gate.e_score_correction_bias.numel() for name, moe in model.moe_layers() if not name.startswith("mtp.")
    )
    assert (main, biases) == (671_026_404_352, 14_848)
