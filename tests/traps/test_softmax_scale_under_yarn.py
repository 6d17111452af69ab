"""Trap 11: the softmax scale carries mscale^2 from mscale_all_dim; cos and sin carry the ratio of the two mscales."""

import math

import pytest
import torch

from soli.config import preset
from soli.model.rope import cos_sin_scale, inverse_frequencies, softmax_scale
from tests.model.oracle import YARN, draw_config


def test_deepseek_v3_as_released() -> None:
    config = preset("deepseek-v3")
    assert softmax_scale(config) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-12)
    assert cos_sin_scale(config) == 1.0


def test_without_yarn_both_are_one() -> None:
    config = draw_config(0, rope_scaling=None)
    assert softmax_scale(config) == config.qk_head_dim**-0.5
    assert cos_sin_scale(config) == 1.0


def test_unequal_mscales_scale_cos_and_sin_by_their_ratio() -> None:
    config = draw_config(0, rope_scaling={**YARN, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.5})
    log = math.log(40)
    assert cos_sin_scale(config) == pytest.approx((0.07 * log + 1) / (0.05 * log + 1), rel=1e-12)
    assert softmax_scale(config) == pytest.approx(config.qk_head_dim**-0.5 * (0.05 * log + 1) ** 2, rel=1e-12)


def test_yarn_leaves_high_frequencies_and_divides_low_ones_by_the_factor() -> None:
    config = preset("deepseek-v3")
    plain = 1.0 / config.rope_theta ** (torch.arange(0, 64, 2) / 64)
    ratio = plain / inverse_frequencies(config)
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(40.0)
    assert (ratio.diff() >= -1e-5).all()
