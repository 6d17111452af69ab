"""FP8 training: which modules take part, and that the loss follows that of higher precision."""

import pytest
import torch

from soli.train.model_options import use_fp8
from soli.train.setup import prepare
from soli.train.trainer import take_step
from tests.train.toy import settings, tiny_model


def test_all_but_the_listed_modules_multiply_in_fp8():
    model = tiny_model()
    names = use_fp8(model)
    attention = [f"self_attn.{p}" for p in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    mlp = [f"{p}_proj" for p in ("gate", "up", "down")]
    mixture = ["mlp.experts", *(f"mlp.shared_experts.{p}" for p in mlp)]
    expected = [f"layers.0.{p}" for p in (*attention, *(f"mlp.{p}" for p in mlp))]
    expected += [f"{block}.{p}" for block in ("layers.1", "mtp.0.block") for p in (*attention, *mixture)]
    assert names == expected


def test_fp8_touches_no_parameter_and_no_other_model():
    plain, quantized = tiny_model(), tiny_model()
    before = {name: p.clone() for name, p in quantized.state_dict().items()}
    ids = torch.arange(12)[None]
    expected = plain(ids)
    use_fp8(quantized)
    assert not torch.equal(quantized(ids), expected) and torch.equal(plain(ids), expected)
    assert all(torch.equal(before[name], p) for name, p in quantized.state_dict().items())


@pytest.mark.slow
def test_the_loss_of_fp8_follows_that_of_bf16_and_fp32(tmp_path, data):
    last = {}
    for precision in ("fp32", "bf16", "fp8"):
        train_settings = settings(run={"precision": precision}, schedule={"learning_rate": 3e-3})
        run = prepare(train_settings, {}, data, tmp_path / precision)
        losses = [take_step(run).loss for _ in range(40)]
        last[precision] = sum(losses[-10:]) / 10
        assert losses[0] - losses[-1] > 1  # it learns
    assert last["fp8"] != last["bf16"]
    for high in ("fp32", "bf16"):
        assert abs(last["fp8"] / last[high] - 1) < 0.02
