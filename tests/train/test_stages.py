"""Extension phases: a run trains them all, resumes bit for bit at every boundary, and exports the last one."""

import json
import os
import signal

import pytest
import torch

import soli
from soli.cli import main
from soli.config import load_config
from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.train import trainer
from soli.train.checkpoints import load_run
from soli.train.run_folder import RunProgress, best_checkpoint, checkpoints, read_progress
from soli.train.runs import read_metrics, summarize
from soli.train.settings import as_recipe, read_settings
from soli.train.setup import prepare
from soli.train.stages import flops_left, next_step
from soli.train.trainer import take_step, train
from tests.train.test_run import assert_equal_state
from tests.train.toy import settings


def yarn(factor: float) -> dict:
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": 64, "mscale_all_dim": 1}


# Pretraining takes 4 steps of 8 sequences of 16, the phases 3 of 2 of 64 and 2 of 1 of 128: steps 5-7 and 8-9.
PHASES = [
    {"sequence_length": 64, "batch_sequences": 2, "learning_rate": 1e-3, "steps": 3, "rope_scaling": yarn(2)},
    {"sequence_length": 128, "batch_sequences": 1, "learning_rate": 5e-4, "tokens": 200, "rope_scaling": yarn(4)},
]
LAST = 9


def extended(phases=PHASES, **sections):
    sections["schedule"] = {"constant_tokens": 128 * 4, **sections.get("schedule", {})}
    return read_settings({**as_recipe(settings(**sections), {}), "extension": phases})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """An uninterrupted run, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(prepare(extended(run={"save_every": 1, "keep": 20}), {}, data, folder)) == "finished"
    return folder


def test_a_run_trains_every_phase(whole):
    saved = [read_progress(path) for path in checkpoints(whole)]
    assert [(p.step, p.stage) for p in saved] == [
        *((n, 0) for n in (1, 2, 3, 4)),
        (5, 1),
        (6, 1),
        (7, 1),
        (8, 2),
        (9, 2),
    ]
    assert [p.tokens for p in saved[3:]] == [512, 640, 768, 896, 1024, 1152]  # the run's, not the stage's
    assert [p.position for p in saved[3:]] == [32, 2, 4, 6, 1, 2]  # each stage has an order of its own
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if line["kind"] == "step"] == [3e-3] * 4 + [1e-3] * 3 + [5e-4] * 2
    evaluated = [(line["step"], line["stage"]) for line in lines if line["kind"] == "evaluation"]
    assert evaluated == [(4, 0), (7, 1), (8, 2), (9, 2)]  # every fourth step, and where a stage ends
    summary = summarize(read_metrics(whole))
    assert (summary.state, summary.stage, summary.tokens) == ("finished", 2, extended().total_tokens)


@pytest.mark.parametrize("step", range(1, LAST))
def test_resuming_is_bit_for_bit_in_every_stage_and_between_them(tmp_path, data, whole, step, monkeypatch):
    def step_then_term(run):
        result = take_step(run)
        if run.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(trainer, "take_step", step_then_term)
    assert train(prepare(extended(), {}, data, tmp_path)) == "signal"
    monkeypatch.undo()
    resumed = prepare(extended(), {}, data, tmp_path)
    assert resumed.progress.step == step
    assert train(resumed) == "finished"
    assert_equal_state(whole, tmp_path)


def test_positions_are_those_of_a_model_built_with_the_phases_yarn(tmp_path, data):
    run = prepare(extended(), {}, data, tmp_path)
    before = [layer.self_attn.scale for layer in run.model.layers]
    for stage in (1, 2):
        run.begin_next_stage()
        config = run.stage.config
        assert config.rope_scaling.factor == 2 * stage and config.max_position_embeddings == 128 * stage
        fresh = Transformer(config, dtype=torch.float32)
        fresh.load_state_dict(run.model.state_dict())
        blocks = [*run.model.layers, *(module.block for module in run.model.mtp)]
        assert all(block.self_attn.scale == fresh.layers[0].self_attn.scale for block in blocks)
        assert fresh.layers[0].self_attn.scale > before[0]  # mscale squared
        at = torch.arange(run.stage.length)[None]
        assert all(torch.equal(a, b) for a, b in zip(run.model.rope(at), fresh.rope(at), strict=True))
        ids = run.stage.heldout_BW[:1, : run.stage.length]
        hidden = run.model.backbone(ids).hidden_BTD
        assert torch.equal(hidden, fresh.backbone(ids).hidden_BTD)
        assert torch.equal(run.model.mtp_step(0, hidden, ids).hidden_BTD, fresh.mtp_step(0, hidden, ids).hidden_BTD)


def test_a_stage_reads_and_evaluates_its_own_length_in_no_more_memory(tmp_path, data):
    run = prepare(extended(run={"micro_sequences": 6}), {}, data, tmp_path)
    assert [stage.micro_sequences for stage in run.stages] == [6, 1, 1]  # 96 tokens: one of 64, and at least one
    assert [stage.heldout_BW.shape for stage in run.stages] == [(4, 18), (1, 66), (1, 130)]
    orders = [stage.batches.take(0, 8)[:, 0].tolist() for stage in run.stages]
    assert len({tuple(order) for order in orders}) == 3
    run.begin_next_stage()
    assert next_step(run.settings, run.progress) == (2, 1e-3)
    step = take_step(run)
    assert step.tokens == 128 and run.progress.position == 2 and run.progress.tokens == 128


def test_export_carries_the_last_phases_yarn(tmp_path, whole):
    assert load_config(checkpoints(whole)[3]).rope_scaling is None  # pretraining's end
    assert main(["export", str(whole), str(tmp_path / "model"), "--format", "fp32"]) == 0
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["rope_scaling"]["factor"] == 4 and written["max_position_embeddings"] == 256
    exported = soli.load_model(tmp_path / "model")
    ids, fresh = torch.arange(200)[None], Transformer(exported.config, dtype=torch.float32)
    torch.testing.assert_close(exported(ids), load_run(whole)(ids))
    assert exported.layers[0].self_attn.scale == fresh.layers[0].self_attn.scale


def test_the_best_checkpoint_is_of_the_last_stage_and_every_stages_last_one_stays(tmp_path, data, monkeypatch):
    real, losses = trainer.evaluate, iter([1.0, 3.0, 2.5, 2.6])

    def evaluate_with_losses(*args):
        return type(real(*args))(next(losses), 1.0, 0.5)

    monkeypatch.setattr(trainer, "evaluate", evaluate_with_losses)
    train(prepare(extended(run={"keep": 1, "save_every": 4}), {}, data, tmp_path))
    assert best_checkpoint(tmp_path).name == "step-00000008"
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["4", "7", "8", "9"]


def test_a_finished_run_continues_with_phases_added_later(tmp_path, data, whole):
    assert train(prepare(extended([]), {}, data, tmp_path)) == "finished"
    assert train(prepare(extended(), {}, data, tmp_path)) == "finished"
    assert_equal_state(whole, tmp_path)


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        (PHASES[:1], "is in extension phase 2, but the recipe has 1"),
        ([PHASES[0], {**PHASES[1], "sequence_length": 64}], "extension 2 was started with another length"),
        ([PHASES[0], {**PHASES[1], "rope_scaling": yarn(8)}], "extension 2 was started with another length"),
    ],
)
def test_a_stage_continues_with_the_settings_it_started_with(data, whole, phases, words):
    with pytest.raises(SoliError, match=words):
        prepare(extended(phases), {}, data, whole)


def test_data_too_short_for_a_later_phase_are_rejected_before_the_first_step(tmp_path, data):
    long = {**PHASES[1], "sequence_length": 4096, "rope_scaling": yarn(64), "tokens": 4096}
    with pytest.raises(
        SoliError, match=r"train\.bin holds .* too few for windows of 4098; reduce the sequence_length"
    ):
        prepare(extended([PHASES[0], long]), {}, data, tmp_path / "run")
    with pytest.raises(SoliError, match=r"valid\.bin holds .* too few for one window of 514"):
        prepare(extended([{**long, "sequence_length": 512}]), {}, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_remaining_work_weighs_long_sequences_more():
    train_settings = extended()
    ends = [RunProgress(tokens=512), RunProgress(tokens=896, stage=1, stage_start=512)]
    left = [flops_left(train_settings, end) for end in (RunProgress(), *ends)]
    assert left[0] > left[1] > left[2] > 0 and (left[1] - left[2]) / 384 > (left[0] - left[1]) / 512
    assert flops_left(train_settings, RunProgress(tokens=1152, stage=2, stage_start=896)) == 0


def test_tokens_before_the_mtp_modules_are_trained_cost_less():
    always, late = settings(), settings(losses={"mtp_from_tokens": 700})
    lacking = (always.flops(0, 1, 16) - settings(model={"num_nextn_predict_layers": 0}).flops(0, 1, 16)) * 700
    assert always.flops(0, 1000, 16) - late.flops(0, 1000, 16) == lacking > 0
    assert late.flops(0, 500, 16) + late.flops(500, 500, 16) == late.flops(0, 1000, 16)
    assert late.flops(800, 200, 16) == always.flops(0, 200, 16)
