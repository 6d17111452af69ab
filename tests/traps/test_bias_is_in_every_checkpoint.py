"""Trap 6: the bias is a persistent fp32 buffer, changed in place, and is in every checkpoint and every export."""

import pytest
import torch

import soli
from soli.train.balance import step_bias
from soli.train.checkpoint_saver import CheckpointSaver
from soli.train.checkpoints import load_run
from soli.train.setup import prepare
from soli.train.trainer import take_step
from tests.train.toy import settings, tiny_model, write_data


def test_changed_in_place_and_no_parameter():
    model = tiny_model()
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers() if "bias" in name}
    step_bias(model, torch.tensor([[9, 0, 1, 1, 1, 1, 1, 1]] * 2), gamma=0.001)
    after = {name: buffer.data_ptr() for name, buffer in model.named_buffers() if "bias" in name}
    assert before == after and set(before) <= set(model.state_dict())
    assert not any("e_score_correction_bias" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("format", ["bf16", "fp8", "fp32"])
def test_in_checkpoint_and_export(tmp_path, format):
    run = prepare(settings(balance={"gamma": 0.001}), {}, write_data(tmp_path / "data"), tmp_path / "run")
    for _ in range(3):
        take_step(run)
        for _, layer in run.model.moe_layers():  # near the released biases, where bf16 could not tell 5.001 from 5
            layer.gate.e_score_correction_bias.add_(0.5)
    with CheckpointSaver(run.folder, keep=1) as saver:
        saver.save(run.model, run.optimizer, run.progress)
    soli.save_model(load_run(run.folder), tmp_path / "export", format=format, tokenizer_from=run.folder)
    exported = soli.load_model(tmp_path / "export")
    pairs = zip(run.model.moe_layers(), exported.moe_layers(), strict=True)
    for (name, trained), (_, loaded) in pairs:
        bias = loaded.gate.e_score_correction_bias
        assert bias.dtype == torch.float32 and bias.unique().numel() > 1
        assert torch.equal(bias, trained.gate.e_score_correction_bias), name
