"""Anomaly detection: values that are not finite are traced to their layer; spikes are reported, skipped or stop."""

import json
import os
import signal

import pytest
import torch

from soli.errors import SoliError
from soli.train import anomalies, trainer
from soli.train.anomalies import TrainingStopped, is_spike
from soli.train.run_folder import checkpoints, read_progress
from soli.train.setup import prepare
from soli.train.trainer import take_step, train
from tests.train.test_run import assert_equal_state
from tests.train.toy import settings

NO_ANOMALY = {"losses": [5.7 + 0.01 * (n % 3) for n in range(50)], "norms": [1.5 + 0.1 * (n % 3) for n in range(50)]}


def prepared(folder, data, history=NO_ANOMALY, **run):
    prepared_run = prepare(settings(run=run, eval={"samples": 0}), {}, data, folder)
    progress = prepared_run.progress
    if progress.step == 0:
        progress.losses, progress.norms = list(history["losses"]), list(history["norms"])
    return prepared_run


def full_state(run):
    """Weights, biases and moments."""
    tensors = {**run.model.state_dict(), **run.optimizer.state()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def changed(before, after):
    return [name for name in after if name not in before or not torch.equal(before[name], after[name])]


def scale_gradient(run, at_position, factor=1e4):
    """Multiply the gradient of one layer in the step that starts at a position of the data."""

    def scale(grad):
        return grad * factor if run.progress.position == at_position else grad

    run.model.layers[1].mlp.experts.down_proj.register_hook(scale)


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("layers.1.self_attn.kv_b_proj.weight", "layers.1.self_attn.kv_b_proj"),
        ("layers.0.input_layernorm.weight", "layers.0.input_layernorm"),
        ("layers.1.mlp.gate.weight", "layers.1.mlp.gate"),
        ("layers.1.mlp.gate.e_score_correction_bias", "layers.1.mlp.gate"),  # with a loss that is finite
        ("layers.1.mlp.experts.down_proj", "layers.1.mlp.experts"),
        ("mtp.0.block.mlp.shared_experts.up_proj.weight", "mtp.0.block.mlp.shared_experts.up_proj"),
        ("embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_weight_that_is_not_finite_is_named_with_its_layer(tmp_path, data, tensor, layer):
    run = prepared(tmp_path, data, on_nan="skip")  # skipping cannot repair a weight
    with torch.no_grad():
        run.model.state_dict()[tensor].fill_(float("nan"))
    before = full_state(run)
    with pytest.raises(TrainingStopped) as stop:
        take_step(run)
    assert f"{layer} is the first layer whose output is not finite, and {tensor} holds such" in str(stop.value)
    assert [name for name in changed(before, full_state(run)) if name != tensor] == []


def test_a_weight_that_fp8_cannot_hold_is_named(tmp_path, data):
    run = prepared(tmp_path, data, precision="fp8")
    with torch.no_grad():
        run.model.layers[1].self_attn.o_proj.weight[0, 0] = float("inf")
    with pytest.raises(SoliError, match=r"layers\.1\.self_attn\.o_proj\.weight is not finite"):
        take_step(run)


def test_a_layer_that_overflows_is_named_where_every_weight_is_finite(tmp_path, data):
    run = prepared(tmp_path, data)
    with torch.no_grad():
        run.model.layers[1].mlp.shared_experts.up_proj.weight.fill_(3e38)
    with pytest.raises(TrainingStopped, match=r"layers\.1\.mlp\.shared_experts\.up_proj is the first layer") as stop:
        take_step(run)
    assert "holds such values" not in str(stop.value)


def test_the_gradient_nearest_to_the_loss_is_named(tmp_path, data):
    run = prepared(tmp_path, data)
    for p in (run.model.embed_tokens.weight, run.model.layers[1].self_attn.o_proj.weight):
        p.register_hook(lambda grad: grad * float("nan"))
    gradient = r"the gradient of layers\.1\.self_attn\.o_proj\.weight is not finite, though"
    with pytest.raises(TrainingStopped, match=gradient):
        take_step(run)


def test_a_step_that_is_not_finite_is_skipped_when_the_recipe_says_so(tmp_path, data):
    run = prepared(tmp_path, data, on_nan="skip")
    scale_gradient(run, 8, float("nan"))
    take_step(run)
    before = full_state(run)
    step = take_step(run)
    assert step.skipped and step.anomaly.layer == "layers.1.mlp.experts"
    assert changed(before, full_state(run)) == [] and all(p.grad is None for p in run.model.parameters())
    assert (run.progress.step, run.progress.position, run.progress.tokens) == (2, 16, 256)
    assert not take_step(run).skipped and changed(before, full_state(run))
    assert (run.progress.skipped, run.progress.skipped_in_row, len(run.progress.losses)) == (1, 0, 50)


@pytest.mark.parametrize("action", ["report", "skip"])
def test_a_spike_is_reported_or_skipped_and_the_run_continues(tmp_path, data, action, capsys):
    run = prepared(tmp_path, data, spike=action)
    scale_gradient(run, 16)
    assert train(run) == "finished"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (entry,) = [line for line in lines if line["kind"] in ("spike", "skip")]
    assert entry["step"] == 3 and entry["layer"] == "layers.1.mlp.experts" and entry["norm"] > 100
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    assert steps == [n for n in range(1, 13) if action == "report" or n != 3]
    output = capsys.readouterr().err
    assert "at step 3 (median of the last 50: 1.6); the largest gradient is in layers.1.mlp.experts" in output
    assert ("skipped 1" in output) is (action == "skip")
    assert read_progress(checkpoints(tmp_path)[-1]).skipped == (action == "skip")


def test_a_skipped_spike_changes_no_bit(tmp_path, data):
    run = prepared(tmp_path, data, spike="skip")
    scale_gradient(run, 8)
    take_step(run)
    before = full_state(run)
    assert take_step(run).skipped
    assert changed(before, full_state(run)) == []
    assert any("|" in name for name in before) and any("correction_bias" in name for name in before)


def test_a_spike_that_stops_the_run_saves_the_state_before_it(tmp_path, data):
    run = prepared(tmp_path, data, spike="stop")
    scale_gradient(run, 16)
    with pytest.raises(TrainingStopped, match="the state before that step is saved"):
        train(run)
    assert read_progress(checkpoints(tmp_path)[-1]).step == 2
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "end"
    resumed = prepared(tmp_path, data, spike="stop")
    assert resumed.progress.step == 2 and take_step(resumed).anomaly is None


def test_ten_skips_in_a_row_stop(tmp_path, data):
    run = prepared(tmp_path, data, {"losses": [1.0] * 50, "norms": NO_ANOMALY["norms"]}, spike="skip")
    with pytest.raises(TrainingStopped, match="after 9 skipped steps in a row"):
        train(run)
    assert read_progress(checkpoints(tmp_path)[-1]).skipped_in_row == 9


def test_a_run_stopped_among_skips_resumes_bit_for_bit(tmp_path, data, monkeypatch):
    whole = prepared(tmp_path / "whole", data, spike="skip")
    scale_gradient(whole, 16)
    scale_gradient(whole, 40)
    train(whole)
    cut, taken = prepared(tmp_path / "cut", data, spike="skip"), []
    scale_gradient(cut, 16)

    def step_then_term(run):
        taken.append(take_step(run))
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken[-1]

    monkeypatch.setattr(trainer, "take_step", step_then_term)
    assert train(cut) == "signal" and taken[-1].skipped
    monkeypatch.undo()
    resumed = prepared(tmp_path / "cut", data, spike="skip")
    scale_gradient(resumed, 40)
    assert resumed.progress.skipped_in_row == 1
    assert train(resumed) == "finished"
    assert_equal_state(tmp_path / "whole", tmp_path / "cut")
    last = [read_progress(checkpoints(tmp_path / name)[-1]) for name in ("whole", "cut")]
    assert last[0].losses == last[1].losses and last[0].norms == last[1].norms and last[0].skipped == 2


def test_the_definition_of_a_spike():
    constant = [2.0] * 50
    assert not is_spike(constant, 2.39, 10) and is_spike(constant, 2.41, 10)  # at least 2 % of the median
    noisy = [2.0 + 0.2 * (-1) ** n for n in range(50)]
    assert not is_spike(noisy, 3.9, 10) and is_spike(noisy, 4.1, 10)
    assert not is_spike(constant, 1.0, 10)  # a fall is no spike
    assert not is_spike(constant, 9.0, 0) and not is_spike(constant[1:], 9.0, 10)
    assert is_spike([*constant[5:], *[50.0] * 5], 2.5, 10)  # a few spikes among the 50 hide no other


def test_the_window_holds_the_last_steps_that_were_not_skipped(tmp_path, data):
    run = prepared(tmp_path, data, {"losses": [], "norms": []})
    for n in range(60):
        anomalies.record_step(run.progress, float(n), 1.0, skipped=n % 2 == 1)
    assert run.progress.losses == [float(n) for n in range(0, 60, 2)] and run.progress.skipped == 30
    for n in range(60):
        anomalies.record_step(run.progress, float(n), 1.0, skipped=False)
    assert run.progress.losses == [float(n) for n in range(10, 60)]


@pytest.mark.parametrize("field", ["on_nan", "spike"])
def test_unknown_actions_are_rejected(field):
    with pytest.raises(SoliError, match=rf"run\.{field} is 'ignore'; it must be one of"):
        settings(run={field: "ignore"})
