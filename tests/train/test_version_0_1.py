"""A run folder written by version 0.1 is listed, exported and resumed as if today's version had written it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import soli
from soli.cli import main
from soli.train.run_folder import checkpoints, read_progress

FIXTURE = Path(__file__).parent.parent / "fixtures/v0_1"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the recipe, the data and the run, which was saved at step 8 of 12; its metrics go on to step 12."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps_and_evaluations(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] in ("step", "evaluation")]


def test_the_run_is_listed(old, capsys):
    assert main(["runs", "list", ".", "--json"]) == 0
    [summary] = json.loads(capsys.readouterr().out)
    assert (summary["folder"], summary["state"], summary["step"], summary["tokens"]) == ("run", "finished", 12, 1536)
    assert summary["loss"] == pytest.approx(4.768444) and summary["heldout_loss"] == pytest.approx(4.688711)
    assert main(["runs", "list", "run"]) == 0
    assert "finished" in capsys.readouterr().out


def test_its_checkpoint_is_exported(old, capsys):
    assert main(["export", "run", "model", "--format", "fp32"]) == 0
    model = soli.load_model(old / "model")
    stored = load_file(checkpoints(old / "run")[-1] / "model.safetensors")
    assert torch.equal(model.embed_tokens.weight, stored["embed_tokens.weight"])
    bias = "layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(model.state_dict()[bias], stored[bias]) and stored[bias].any()


def test_it_resumes_with_the_losses_that_version_0_1_measured(old, capsys):
    before = steps_and_evaluations(old / "run")
    assert main(["train", "recipe.toml", "--out", "run"]) == 0
    assert "resuming after step 8" in capsys.readouterr().err
    after = steps_and_evaluations(old / "run")
    assert [(line["kind"], line["step"]) for line in after] == [(line["kind"], line["step"]) for line in before]
    for old_line, new_line in zip(before, after, strict=True):
        assert new_line["loss"] == pytest.approx(old_line["loss"], abs=1e-4)
        if new_line["kind"] == "step":
            assert new_line["mtp"] == pytest.approx(old_line["mtp"], abs=1e-4)
    assert before[-5]["step"] == 9 and "dead_experts" in after[-2]["load"]["mtp.0"]
    assert read_progress(checkpoints(old / "run")[-1]).step == 12
