"""Trap 17: a configuration without `aux_loss_alpha` means 1e-4 (section 4.2), not 0; an explicit 0 stays 0."""

import pytest

from soli.config import PRESETS, ModelConfig


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2", "deepseek_v2"])
@pytest.mark.parametrize(("fields", "expected"), [({}, 1e-4), ({"aux_loss_alpha": None}, 1e-4)])
def test_absent_means_the_papers_value(model_type, fields, expected):
    config = ModelConfig.from_dict({"model_type": model_type, "num_experts_per_tok": 6, **fields})
    assert config.aux_loss_alpha == expected


@pytest.mark.parametrize("value", [0, 0.0, 0.001])
def test_an_explicit_value_stays(value):
    config = ModelConfig.from_dict({**PRESETS["nano"], "aux_loss_alpha": value})
    assert config.aux_loss_alpha == value
    assert config.to_dict()["aux_loss_alpha"] == value
