"""Whole runs of a toy: they learn, stop, resume bit for bit, and reject what does not belong together."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from resource import RLIMIT_FSIZE

import pytest
import torch
from safetensors.torch import load_file

import soli
from soli.cli import main
from soli.errors import SoliError
from soli.train import trainer
from soli.train.checkpoint_saver import CheckpointSaver
from soli.train.checkpoints import load_run, load_weights
from soli.train.run_folder import best_checkpoint, checkpoints, read_progress
from soli.train.setup import prepare
from soli.train.trainer import take_step, train
from tests.train.toy import RECIPE, settings, tiny_model


def tensors(run: Path) -> dict[str, torch.Tensor]:
    last = checkpoints(run)[-1]
    return {**load_file(last / "model.safetensors"), **load_file(last / "optimizer.safetensors")}


def assert_equal_state(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_falls(tmp_path, data, optimizer, precision):
    sections = {"optimizer": {"name": optimizer}, "run": {"precision": precision}, "schedule": {"learning_rate": 1e-2}}
    train_settings = settings(**sections)
    run = prepare(train_settings, {}, data, tmp_path)
    steps = [take_step(run) for _ in range(40)]
    assert steps[0].loss == pytest.approx(5.66, abs=0.3)  # ln 288: nothing is learned yet
    assert steps[-1].loss < 2.6 and steps[-1].mtp < 3.6
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_a_run_writes_metrics_recipe_and_checkpoints(tmp_path, data):
    assert train(prepare(settings(), {"folder": "x"}, data, tmp_path)) == "finished"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 13))
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [4, 8, 12]
    assert lines[0]["kind"] == "begin"
    assert set(lines[1]["load"]) == {"layers.1", "mtp.0"}
    assert json.loads((tmp_path / "recipe.resolved.json").read_text())["data"] == {"folder": "x"}
    last = checkpoints(tmp_path)[-1]
    assert last.name == "step-00000012" and len(checkpoints(tmp_path)) <= 3
    assert read_progress(last).tokens == 12 * 128 and read_progress(last).position == 12 * 8


def test_mtp_modules_are_not_trained_before_their_first_token(tmp_path, data):
    run = prepare(settings(losses={"mtp_from_tokens": 3 * 128}), {}, data, tmp_path)
    start = {name: tensor.clone() for name, tensor in run.model.mtp.state_dict().items()}
    early = [take_step(run) for _ in range(3)]
    assert all(step.mtp == 0 and len(step.counts_LE) == 1 for step in early)  # layers.1, and not yet mtp.0
    assert all(torch.equal(start[name], tensor) for name, tensor in run.model.mtp.state_dict().items())
    step = take_step(run)
    assert step.mtp > 0 and len(step.counts_LE) == 2
    unmoved = [name for name, tensor in run.model.mtp.state_dict().items() if torch.equal(start[name], tensor)]
    assert unmoved == []


@pytest.mark.parametrize("mtp_from_tokens", [128 * 3, 128 * 7])
def test_a_run_whose_mtp_starts_late_resumes_bit_for_bit(tmp_path, data, mtp_from_tokens):
    whole = settings(losses={"mtp_from_tokens": mtp_from_tokens})
    train(prepare(whole, {}, data, tmp_path / "whole"))
    cut = prepare(settings(losses={"mtp_from_tokens": mtp_from_tokens}), {}, data, tmp_path / "cut")
    for _ in range(5):
        take_step(cut)
    with CheckpointSaver(tmp_path / "cut", keep=1) as saver:
        saver.save(cut.model, cut.optimizer, cut.progress)
    assert train(prepare(whole, {}, data, tmp_path / "cut")) == "finished"
    assert_equal_state(tmp_path / "whole", tmp_path / "cut")


RAMP = {"batch_sequences_start": 3, "batch_ramp_tokens": 128 * 6}


@pytest.mark.parametrize(("optimizer", "schedule"), [("adamw", {}), ("muon", {}), ("adamw", RAMP)])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, data, optimizer, schedule, moments, monkeypatch):
    train_settings = settings(optimizer={"name": optimizer, "moments": moments}, schedule=schedule)
    train(prepare(train_settings, {}, data, tmp_path / "whole"))
    interrupted = prepare(train_settings, {}, data, tmp_path / "cut")
    taken = []

    def step_then_term(run):
        taken.append(take_step(run))
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken[-1]

    monkeypatch.setattr(trainer, "take_step", step_then_term)
    assert train(interrupted) == "signal"
    monkeypatch.undo()
    resumed = prepare(train_settings, {}, data, tmp_path / "cut")
    assert resumed.progress.step == 5
    assert train(resumed) == "finished"
    assert_equal_state(tmp_path / "whole", tmp_path / "cut")


def test_a_failed_save_ends_the_run_and_older_checkpoints_remain(tmp_path, data, monkeypatch):
    run = prepare(settings(run={"keep": 1}), {}, data, tmp_path)
    limits = resource.getrlimit(RLIMIT_FSIZE)
    taken = []

    def step_on_a_full_disk(run):
        taken.append(take_step(run))
        if len(taken) == 5:  # the first checkpoint is due at step 4, the second at 8
            while not checkpoints(tmp_path):
                time.sleep(0.01)
            resource.setrlimit(RLIMIT_FSIZE, (50_000, limits[1]))
        return taken[-1]

    monkeypatch.setattr(trainer, "take_step", step_on_a_full_disk)
    try:
        with pytest.raises(SoliError, match=r"step-00000008 could not be written \(File too large\)"):
            train(run)
    finally:
        resource.setrlimit(RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    assert train(prepare(settings(), {}, data, tmp_path)) == "finished"


def test_a_checkpoint_of_another_model_is_rejected_by_name(tmp_path, data):
    train(prepare(settings(), {}, data, tmp_path))
    last = checkpoints(tmp_path)[-1]
    with pytest.raises(SoliError, match=r"model/.* is of shape"):
        load_weights(last, tiny_model(hidden_size=16))
    with pytest.raises(SoliError, match=r"has no model/layers\.2\."):
        load_weights(last, tiny_model(num_hidden_layers=3))
    with pytest.raises(SoliError, match=r"has model/mtp\.0\..*, which the recipe's model lacks"):
        load_weights(last, tiny_model(num_nextn_predict_layers=0))


def test_an_incomplete_checkpoint_is_ignored_and_removed(tmp_path, data):
    train(prepare(settings(), {}, data, tmp_path))
    incomplete = tmp_path / "checkpoints" / ".step-00000099"
    shutil.copytree(checkpoints(tmp_path)[-1], incomplete)
    (incomplete / "optimizer.safetensors").unlink()
    longer = settings(schedule={"constant_tokens": 128 * 16})
    run = prepare(longer, {}, data, tmp_path)
    assert run.progress.step == 12
    train(run)
    assert not incomplete.exists() and checkpoints(tmp_path)[-1].name == "step-00000016"


def test_a_time_limit_saves_and_stops(tmp_path, data):
    assert train(prepare(settings(run={"max_minutes": 1e-9}), {}, data, tmp_path)) == "time"
    assert read_progress(checkpoints(tmp_path)[-1]).step == 1


def test_the_best_checkpoint_outlives_the_latest(tmp_path, data, monkeypatch):
    real, losses = trainer.evaluate, iter([3.0, 1.0, 2.0, 2.5])

    def evaluate_with_losses(*args):
        return type(real(*args))(next(losses), 1.0, 0.5)

    monkeypatch.setattr(trainer, "evaluate", evaluate_with_losses)
    train(prepare(settings(run={"keep": 1}, schedule={"constant_tokens": 128 * 16}), {}, data, tmp_path))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000008", "step-00000016"]
    assert best_checkpoint(tmp_path).name == "step-00000008"


def test_nan_names_the_step_and_changes_no_weight(tmp_path, data):
    run = prepare(settings(), {}, data, tmp_path)
    take_step(run)
    with torch.no_grad():
        run.model.norm.weight[0] = float("nan")
    before = run.model.lm_head.weight.detach().clone()
    with pytest.raises(SoliError, match="at step 2"):
        take_step(run)
    assert torch.equal(before, run.model.lm_head.weight)


def test_a_gradient_that_is_not_finite_ends_the_run_with_nothing_saved(tmp_path, data):
    run = prepare(settings(run={"save_every": 1}), {}, data, tmp_path)
    router = run.model.layers[1].mlp.gate
    router.weight.register_hook(lambda grad: grad * float("inf"))
    biases = router.e_score_correction_bias.clone()
    with pytest.raises(SoliError, match=r"gradient of layers\.1\.mlp\.gate\.weight is not finite"):
        train(run)
    assert checkpoints(tmp_path) == [] and run.progress.step == 0
    assert torch.equal(biases, router.e_score_correction_bias)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"hidden_size": 16}}, r"model\.hidden_size = 32, not 16"),
        ({"run": {"seed": 4}}, r"run\.seed = 0, not 4"),
        ({"optimizer": {"name": "muon"}}, r"optimizer\.name"),
    ],
)
def test_a_run_is_not_resumed_by_another_recipe(tmp_path, data, change, words):
    train(prepare(settings(), {}, data, tmp_path))
    with pytest.raises(SoliError, match=words):
        prepare(settings(**change), {}, data, tmp_path)


def test_a_run_is_not_resumed_with_rebuilt_data(tmp_path, data):
    changed = tmp_path / "data"
    shutil.copytree(data, changed)
    train(prepare(settings(), {}, changed, tmp_path / "run"))
    meta = json.loads((changed / "meta.json").read_text())
    (changed / "meta.json").write_text(json.dumps(meta | {"tokenizer_sha256": "b"}))
    with pytest.raises(SoliError, match="data whose tokenizer_sha256"):
        prepare(settings(), {}, changed, tmp_path / "run")


def test_data_packed_with_another_fim_rate_are_rejected(tmp_path, data):
    changed = tmp_path / "data"
    shutil.copytree(data, changed)
    meta = json.loads((changed / "meta.json").read_text())
    (changed / "meta.json").write_text(json.dumps(meta | {"fim_rate": 0.0}))
    with pytest.raises(SoliError, match=r"packed with fim_rate 0\.0, but the recipe's data\.fim_rate is 0\.1"):
        prepare(settings(), {"fim_rate": 0.1}, changed, tmp_path / "run")
    prepare(settings(), {"fim_rate": 0.0}, changed, tmp_path / "run")


def test_a_vocabulary_larger_than_the_model_is_rejected(tmp_path, data):
    with pytest.raises(SoliError, match=r"model\.vocab_size=272"):
        prepare(settings(model={"vocab_size": 100}), {}, data, tmp_path)


def test_a_device_that_is_not_there_is_rejected(tmp_path, data):
    with pytest.raises(SoliError, match="this machine lacks"):
        prepare(settings(run={"device": "cuda:77"}), {}, data, tmp_path)


def test_train_and_export_by_command(tmp_path, data, capsys):
    lines = [
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items()) for name, table in RECIPE.items()
    ]
    recipe = tmp_path / "toy.toml"
    recipe.write_text(f"[data]\nfolder = {json.dumps(str(data))}\n" + "\n".join(lines))
    arguments = ["train", str(recipe), "--out", str(tmp_path / "run"), "--set", "schedule.constant_tokens=512"]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["schedule"]["constant_tokens"] == 512
    assert main(arguments) == 0
    assert "held-out at step 4" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model"), "--format", "fp32"]) == 0
    exported = soli.load_model(tmp_path / "model")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(exported(ids), load_run(tmp_path / "run")(ids))
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    assert main(["export", str(tmp_path), str(tmp_path / "other")]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
