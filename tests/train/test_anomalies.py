"""The guard: what is not finite is traced to its layer; spikes are reported, skipped or the end; runs resume."""

import json
import os
import signal

import pytest
import torch

from soli.errors import SoliError
from soli.train import anomalies, trainer
from soli.train.anomalies import TrainingStopped, is_spike
from soli.train.checkpoints import checkpoints, read_progress
from soli.train.setup import prepare
from soli.train.trainer import take_step, train
from tests.train.test_run import assert_equal_state
from tests.train.toy import settings, write_data

QUIET = {"losses": [5.7 + 0.01 * (n % 3) for n in range(50)], "norms": [1.5 + 0.1 * (n % 3) for n in range(50)]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("toy") / "data")


def prepared(folder, data, history=QUIET, **run):
    wanted = settings(run=run, eval={"samples": 0})
    made = prepare(wanted, {}, data, folder)
    if made.progress.step == 0:
        made.progress.losses, made.progress.norms = list(history["losses"]), list(history["norms"])
    return made


def everything(run):
    """Weights, biases and moments."""
    tensors = {**run.model.state_dict(), **run.optimizer.state()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def changed(before, after):
    return [name for name in after if name not in before or not torch.equal(before[name], after[name])]


def spoil(run, at_position, factor=1e4):
    """Let the gradient of one layer jump in the step that begins at a position of the data, whenever it is taken."""

    def blow(grad):
        return grad * factor if run.progress.position == at_position else grad

    run.model.layers[1].mlp.experts.down_proj.register_hook(blow)


@pytest.mark.parametrize(
    ("poisoned", "layer"),
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
def test_a_poisoned_weight_is_named_with_its_layer(tmp_path, data, poisoned, layer):
    run = prepared(tmp_path, data, on_nan="skip")  # which cannot heal a weight
    with torch.no_grad():
        run.model.state_dict()[poisoned].fill_(float("nan"))
    before = everything(run)
    with pytest.raises(TrainingStopped) as stop:
        take_step(run)
    assert f"{layer} is the first layer whose output is not finite, and {poisoned} holds such" in str(stop.value)
    assert [name for name in changed(before, everything(run)) if name != poisoned] == []


def test_a_weight_that_fp8_cannot_hold_is_named(tmp_path, data):
    run = prepared(tmp_path, data, precision="fp8")
    with torch.no_grad():
        run.model.layers[1].self_attn.o_proj.weight[0, 0] = float("inf")
    with pytest.raises(SoliError, match=r"layers\.1\.self_attn\.o_proj\.weight is not finite"):
        take_step(run)


def test_a_layer_that_overflows_is_named_though_no_weight_is_to_blame(tmp_path, data):
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
    spoil(run, 8, float("nan"))
    take_step(run)
    before = everything(run)
    step = take_step(run)
    assert step.skipped and step.trouble.layer == "layers.1.mlp.experts"
    assert changed(before, everything(run)) == [] and all(p.grad is None for p in run.model.parameters())
    assert (run.progress.step, run.progress.position, run.progress.tokens) == (2, 16, 256)
    assert not take_step(run).skipped and changed(before, everything(run))
    assert (run.progress.skipped, run.progress.skipped_in_row, len(run.progress.losses)) == (1, 0, 50)


@pytest.mark.parametrize("rule", ["report", "skip"])
def test_a_spike_is_reported_or_skipped_and_the_run_goes_on(tmp_path, data, rule, capsys):
    run = prepared(tmp_path, data, spike=rule)
    spoil(run, 16)
    assert train(run) == "finished"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (told,) = [line for line in lines if line["kind"] in ("spike", "skip")]
    assert told["step"] == 3 and told["layer"] == "layers.1.mlp.experts" and told["norm"] > 100
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    assert steps == [n for n in range(1, 13) if rule == "report" or n != 3]
    said = capsys.readouterr().err
    assert "at step 3 (median of the last 50: 1.6); the largest gradient is in layers.1.mlp.experts" in said
    assert ("skipped 1" in said) is (rule == "skip")
    assert read_progress(checkpoints(tmp_path)[-1]).skipped == (rule == "skip")


def test_a_skipped_spike_moves_no_bit(tmp_path, data):
    run = prepared(tmp_path, data, spike="skip")
    spoil(run, 8)
    take_step(run)
    before = everything(run)
    assert take_step(run).skipped
    assert changed(before, everything(run)) == []
    assert any("|" in name for name in before) and any("correction_bias" in name for name in before)


def test_a_stopping_spike_leaves_the_state_before_it(tmp_path, data):
    run = prepared(tmp_path, data, spike="stop")
    spoil(run, 16)
    with pytest.raises(TrainingStopped, match="the state before that step is saved"):
        train(run)
    assert read_progress(checkpoints(tmp_path)[-1]).step == 2
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "end"
    resumed = prepared(tmp_path, data, spike="stop")
    assert resumed.progress.step == 2 and take_step(resumed).trouble is None


def test_ten_skips_in_a_row_stop(tmp_path, data):
    run = prepared(tmp_path, data, {"losses": [1.0] * 50, "norms": QUIET["norms"]}, spike="skip")
    with pytest.raises(TrainingStopped, match="after 9 skipped steps in a row"):
        train(run)
    assert read_progress(checkpoints(tmp_path)[-1]).skipped_in_row == 9


def test_a_run_stopped_among_skips_resumes_bit_for_bit(tmp_path, data, monkeypatch):
    whole = prepared(tmp_path / "whole", data, spike="skip")
    spoil(whole, 16)
    spoil(whole, 40)
    train(whole)
    cut, taken = prepared(tmp_path / "cut", data, spike="skip"), []
    spoil(cut, 16)

    def step_then_term(run):
        taken.append(take_step(run))
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken[-1]

    monkeypatch.setattr(trainer, "take_step", step_then_term)
    assert train(cut) == "signal" and taken[-1].skipped
    monkeypatch.undo()
    resumed = prepared(tmp_path / "cut", data, spike="skip")
    spoil(resumed, 40)
    assert resumed.progress.skipped_in_row == 1
    assert train(resumed) == "finished"
    assert_equal_state(tmp_path / "whole", tmp_path / "cut")
    last = [read_progress(checkpoints(tmp_path / name)[-1]) for name in ("whole", "cut")]
    assert last[0].losses == last[1].losses and last[0].norms == last[1].norms and last[0].skipped == 2


def test_what_a_spike_is():
    rest = [2.0] * 50
    assert not is_spike(rest, 2.39, 10) and is_spike(rest, 2.41, 10)  # the floor: 2 % of the median
    noisy = [2.0 + 0.2 * (-1) ** n for n in range(50)]
    assert not is_spike(noisy, 3.9, 10) and is_spike(noisy, 4.1, 10)
    assert not is_spike(rest, 1.0, 10)  # a fall is none
    assert not is_spike(rest, 9.0, 0) and not is_spike(rest[1:], 9.0, 10)
    assert is_spike([*rest[5:], *[50.0] * 5], 2.5, 10)  # a few spikes among the 50 hide no other


def test_the_window_forgets_and_skips_do_not_enter_it(tmp_path, data):
    run = prepared(tmp_path, data, {"losses": [], "norms": []})
    for n in range(60):
        anomalies.remember(run.progress, float(n), 1.0, skipped=n % 2 == 1)
    assert run.progress.losses == [float(n) for n in range(0, 60, 2)] and run.progress.skipped == 30
    for n in range(60):
        anomalies.remember(run.progress, float(n), 1.0, skipped=False)
    assert run.progress.losses == [float(n) for n in range(10, 60)]


@pytest.mark.parametrize("field", ["on_nan", "spike"])
def test_rules_that_do_not_exist_are_refused(field):
    with pytest.raises(SoliError, match=rf"run\.{field} is 'ignore'; it must be one of"):
        settings(run={field: "ignore"})
