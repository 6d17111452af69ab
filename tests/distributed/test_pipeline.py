"""Ranks with some layers each compute what one process computes with the same micro-batches.

Bit-identical where the sums are the same: every stage adds the gradients of micro-batches in their order, and the clip
norm is taken of the same numbers. Stages of several ranks have the bits of one mesh that computes all layers. With MTP
modules or a tied head the embedding's gradient is a sum over two ranks, of which each first adds up its micro-batches:
then the run is as far from one process as that one is from itself with other micro-batches (test_equal_numbers.py).
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor

import soli
from soli.config import resolve
from soli.data.recipe import load_recipe
from soli.errors import SoliError
from soli.parallel.pipeline import check_torch
from soli.parallel.ranks import joined
from soli.parallel.stages import SCHEDULES, divide_layers, find_schedule, layer_costs
from soli.train.checkpoint_saver import CheckpointSaver
from soli.train.checkpoints import export_run, load_run, run_state
from soli.train.schedule import ramp_batches
from soli.train.settings import as_recipe, read_settings
from soli.train.setup import prepare
from soli.train.trainer import take_step, train
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Trained, saved_state, train_each, train_steps
from tests.distributed.test_equal_numbers import BATCH, STEPS, assert_as_close_as_other_micro_batches
from tests.distributed.test_kill import (
    AS_ONE_PROCESS,
    MANY,
    WITHIN,
    ranks_of,
    recipe_file,
    saved_step,
    start,
    wait_for_checkpoint,
)
from tests.train.toy import settings

MICRO = 2  # sequences: four micro-batches of a batch
FEW_STEPS = 6
SLOW = pytest.mark.slow


def runs_here(schedule: str) -> bool:
    """Whether the installed torch computes this schedule's gradients."""
    try:
        check_torch(SCHEDULES[schedule])
    except SoliError:
        return False
    return True


HERE = [schedule for schedule in SCHEDULES if runs_here(schedule)]
NO_MTP = {"num_nextn_predict_layers": 0}
DENSE = {"n_routed_experts": 0, "n_group": 1, "topk_group": 1}


def sections(pipeline: int, schedule: str = "1F1B", /, micro: int = MICRO, **changes: dict) -> dict:
    """Changes of the toy's recipe; enough layers for two stages on each of two ranks."""
    model = {"num_hidden_layers": 4 if SCHEDULES[schedule].stages_per_rank == 2 or pipeline == 4 else 2}
    parallel = {"pipeline": pipeline, "schedule": schedule}
    return {
        **changes,
        "model": model | changes.get("model", {}),
        "run": {"micro_sequences": micro, **changes.get("run", {})},
        "parallel": parallel | changes.get("parallel", {}),
    }


def whole(ranks: list[Trained]) -> Trained:
    """The run of all ranks, whose measurements agree, as do the tensors that several of them have."""
    state: dict[str, torch.Tensor] = {}
    for rank in ranks:
        assert rank.losses == ranks[0].losses and rank.norms == ranks[0].norms
        assert all(torch.equal(a, b) for a, b in zip(rank.counts, ranks[0].counts, strict=True))
        for name, tensor in rank.state.items():
            assert torch.equal(state.setdefault(name, tensor), tensor), name
    return Trained(ranks[0].losses, ranks[0].norms, ranks[0].counts, state)


def alone(recipe: dict, micro: int | None = None) -> dict:
    """The same for one process."""
    run = recipe["run"] | ({} if micro is None else {"micro_sequences": micro})
    return recipe | {"run": run, "parallel": {}}


def check(
    folder: Path,
    data: Path,
    world: int,
    recipes: dict[str, dict],
    exact: set[str],
    steps: int = STEPS,
    other_sizes: tuple[int, ...] = (BATCH, BATCH // 2),
) -> None:
    """Each recipe on `world` ranks against one process, bit by bit those that are `exact`; the others as close as the
    farther of one process's runs with other micro-batches."""
    by_rank = run_ranks(train_each, world, folder / "ranks", data, folder / "many", steps, list(recipes.values()))
    for number, (name, recipe) in enumerate(recipes.items()):
        many = whole([runs[number] for runs in by_rank])
        one = train_steps(data, folder / f"one {name}", steps, alone(recipe))
        assert many.state.keys() == one.state.keys()
        if name in exact:
            assert many.differing(one) == [], name
            assert (many.losses, many.norms) == (one.losses, one.norms), name
            assert all(torch.equal(a, b) for a, b in zip(many.counts, one.counts, strict=True))
        else:
            alternatives = {f"{micro} {name}": alone(recipe, micro) for micro in other_sizes}
            others = [train_steps(data, folder / folder_name, steps, r) for folder_name, r in alternatives.items()]
            assert_as_close_as_other_micro_batches(many, one, max(others, key=one.distance))


def test_two_stages(tmp_path, data):
    """Clipped, with the balance loss; the dense layer first, the mixture on the last stage."""
    recipes = {
        "no MTP": sections(2, model=NO_MTP, balance={"alpha": 0.01}),
        "MTP, Muon, recomputed": sections(2, optimizer={"name": "muon"}, run={"activation_checkpointing": True}),
    }
    check(tmp_path, data, 2, recipes, {"no MTP"}, FEW_STEPS, (BATCH,))


SCHEDULE_RECIPES = {  # for two ranks
    f"{schedule}, {name}": (schedule, changes)
    for schedule in SCHEDULES
    for name, changes in {
        "no MTP": {"model": NO_MTP, "balance": {"alpha": 0.01}},
        "MTP": {},
        "Muon, recomputed": {"optimizer": {"name": "muon"}, "run": {"activation_checkpointing": True}},
        "bf16 moments": {"model": NO_MTP, "optimizer": {"moments": "bf16"}},
        "tied": {"model": NO_MTP | {"tie_word_embeddings": True}},
        "tied, MTP": {"model": {"tie_word_embeddings": True}},
        "MTP late": {"losses": {"mtp_from_tokens": 128 * 5}},
        "every second layer a mixture, no MTP": {"model": NO_MTP | {"first_k_dense_replace": 0, "moe_layer_freq": 2}},
        "dense, no MTP": {"model": NO_MTP | DENSE},
    }.items()
    if not (name == "tied, MTP" and SCHEDULES[schedule].splits_backward)
}
RAMP = {"batch_sequences_start": 4, "batch_ramp_tokens": 16 * 22}  # batches of 4 to 8 sequences
SCHEDULE_RECIPES["1F1B, batch ramp"] = "1F1B", {"schedule": RAMP}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", HERE)
def test_every_schedule_on_two_ranks(tmp_path, data, schedule):
    cases = {name: case for name, case in SCHEDULE_RECIPES.items() if case[0] == schedule}
    micro = 1 if schedule == "DualPipeV" else MICRO  # it needs as many micro-batches as stages, four
    recipes = {name: sections(2, schedule, micro, **changes) for name, (_, changes) in cases.items()}
    check(tmp_path, data, 2, recipes, {name for name in recipes if name.endswith(("no MTP", "bf16 moments"))})


MUON = {"optimizer": {"name": "muon"}}
FOUR_RANKS = {
    "4 stages": sections(4, model=NO_MTP),
    "4 stages, MTP": sections(4, **MUON),
    "2 x data": sections(2, micro=1, parallel={"data": 2}),
    "2 x expert, Muon, recomputed": sections(
        2, micro=1, parallel={"expert": 2}, run={"activation_checkpointing": True}, **MUON
    ),
    "interleaved x data, Muon": sections(2, "Interleaved1F1B", 1, parallel={"data": 2}, **MUON),
}


@SLOW
def test_four_ranks(tmp_path, data):
    check(tmp_path, data, 4, FOUR_RANKS, {"4 stages"})


SPLIT_BACKWARD = {
    f"{schedule} x {axis}": sections(2, schedule, 1, parallel={axis: 2, "keep_gathered": True}, **changes)
    for schedule, axis, changes in (
        ("ZBVZeroBubble", "data", MUON),
        ("ZBVZeroBubble", "expert", {"balance": {"alpha": 0.01}}),
        ("DualPipeV", "data", {"run": {"activation_checkpointing": True}}),
        ("DualPipeV", "expert", MUON),
        ("DualPipeV", "replicate", {"model": {"num_nextn_predict_layers": 0}}),
    )
}


@SLOW
def test_schedules_that_split_a_backward_pass_on_stages_of_several_ranks(tmp_path, data):
    """With MTP the last stage has a copy of the embedding beside the first stage's, on the same rank."""
    check(tmp_path, data, 4, SPLIT_BACKWARD, set(), FEW_STEPS, (BATCH,))


UNCLIPPED = {"clip": 1e9}  # of shards the norm is added up in another order
MESHES = {
    f"{schedule} x {axis}": sections(
        2, schedule, 1, model=NO_MTP, optimizer=UNCLIPPED, parallel={axis: 2, "keep_gathered": True}
    )
    for schedule in SCHEDULES
    for axis in ("data", "expert", "replicate")
}


@SLOW
def test_a_pipeline_of_meshes_has_the_bits_of_one_mesh(tmp_path, data):
    """Of two ranks that gather parameters and add gradients once a step, as stages do."""
    stages = list(MESHES.values())
    meshes = [{**recipe, "parallel": {**recipe["parallel"], "pipeline": 1}} for recipe in stages]
    many = run_ranks(train_each, 4, tmp_path / "ranks", data, tmp_path / "many", FEW_STEPS, stages)
    few = run_ranks(train_each, 2, tmp_path / "ranks of one", data, tmp_path / "few", FEW_STEPS, meshes)
    for number, name in enumerate(MESHES):
        one = few[0][number]
        assert whole([runs[number] for runs in many]).differing(one) == [], name
        assert many[0][number].losses == one.losses
        assert many[0][number].norms == pytest.approx(one.norms, rel=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(many[0][number].counts, one.counts, strict=True))


def resume_each(data: Path, folder: Path, recipes: list[dict]) -> list[tuple[dict, dict]]:
    """One session after another in one folder: what the checkpoint has, and what was loaded; then a step is saved."""
    states = []
    for number, recipe in enumerate(recipes):
        stored = saved_state(folder) if number else {}
        run = prepare(settings(**recipe), {}, data, folder)
        loaded = {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in run_state(run.model, run.optimizer).items()
            if "rng" not in name
        }
        states.append((stored, loaded))
        take_step(run)
        with CheckpointSaver(folder, keep=9) as saver:
            saver.save(run.model, run.optimizer, run.progress)
        run.ranks.of_first(None)  # the checkpoint is complete
    return states


@pytest.mark.parametrize(
    ("world", "meshes"),
    [
        (2, [{"pipeline": 2}, {"data": 2}, {"pipeline": 2, "schedule": HERE[min(2, len(HERE) - 1)]}]),
        pytest.param(
            4,
            [{"pipeline": 4}, {"pipeline": 2, "data": 2}, {"expert": 4}, {"pipeline": 2, "expert": 2}, {"data": 4}],
            marks=SLOW,
        ),
    ],
)
def test_any_mesh_reads_what_a_pipeline_wrote(tmp_path, data, world, meshes):
    """And a pipeline what any mesh wrote, one process included; then it is exported."""
    folder, tied = tmp_path / "run", {"num_hidden_layers": 4, "tie_word_embeddings": world == 4}
    base = {"model": tied, "run": {"micro_sequences": 1}, "optimizer": {"name": "muon"}}
    by_rank = run_ranks(
        resume_each, world, tmp_path / "ranks", data, folder, [base | {"parallel": mesh} for mesh in meshes]
    )
    for number in range(1, len(meshes)):
        stored = by_rank[0][number][0]
        loaded = {name: tensor for rank in by_rank for name, tensor in rank[number][1].items()}
        assert loaded.keys() == stored.keys()
        assert [name for name in stored if not torch.equal(stored[name], loaded[name])] == []
    stored = saved_state(folder)
    one = prepare(settings(**base), {}, data, folder)
    loaded = {name: tensor for name, tensor in run_state(one.model, one.optimizer).items() if "rng" not in name}
    assert loaded.keys() == stored.keys()
    assert [name for name in stored if not torch.equal(stored[name], loaded[name])] == []
    export_run(folder, tmp_path / "model", "fp32")
    exported = soli.load_model(tmp_path / "model", dtype=torch.float32, mtp=True).state_dict()
    expected = load_run(folder).state_dict()
    assert [name for name in expected if not torch.equal(expected[name], exported[name])] == []


PHASE = {"sequence_length": 32, "batch_sequences": 4, "steps": 2, "learning_rate": 1e-3}


def train_run(data: Path, folder: Path, recipe: dict) -> None:
    """To the end of pretraining and of an extension phase, whose sequences are longer."""
    phases = {"extension": [PHASE]}
    run = prepare(read_settings(as_recipe(settings(**recipe), {}) | phases), {}, data, folder)
    with joined(run.ranks):
        train(run)


def lines(folder: Path) -> list[dict]:
    """A run's metrics without what a clock says."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    clock = ("seconds", "tokens_per_second", "tflops", "took", "time")
    return [{key: value for key, value in entry.items() if key not in clock} for entry in entries]


def test_metrics_evaluations_and_samples_are_those_of_one_process(tmp_path, data):
    """Losses, loads of every layer, held-out loss, bits per byte and translations, all written by the first rank."""
    recipe = sections(2, model=NO_MTP, schedule={"constant_tokens": 128 * 6})
    run_ranks(train_run, 2, tmp_path / "ranks", data, tmp_path / "many", recipe)
    train_run(data, tmp_path / "one", alone(recipe))
    many, one = lines(tmp_path / "many"), lines(tmp_path / "one")
    assert many == one
    assert {entry["kind"] for entry in many} >= {"step", "evaluation"}
    assert any(entry.get("samples") for entry in many)


def steps_with_a_damaged_bias(data: Path, folder: Path, recipe: dict) -> list[str]:
    """What a rank says to a bias that is not finite, on the first stage alone."""
    run = prepare(settings(**recipe), {}, data, folder)
    for name, mixture in run.model.moe_layers():
        if name == "layers.1":
            mixture.gate.e_score_correction_bias[0] = float("nan")
    with pytest.raises(SoliError) as stop:
        take_step(run)
    return [str(stop.value)]


@SLOW
def test_all_stages_stop_at_a_bias_that_is_not_finite(tmp_path, data):
    recipe = sections(2, model={"num_hidden_layers": 4})
    for (sentence,) in run_ranks(steps_with_a_damaged_bias, 2, tmp_path, data, tmp_path / "run", recipe):
        assert "layers.1.mlp.gate.e_score_correction_bias is not finite on rank 0; training stopped" in sentence


@SLOW
def test_a_killed_stage_ends_the_others_and_the_run_resumes(tmp_path, data):
    """With soli train --processes; it ends with the bits of one process that was never stopped."""
    run = tmp_path / "run"
    changes = {"parallel.data": 1, "parallel.pipeline": 2, "run.micro_sequences": MICRO}
    changes |= {f"model.{name}": value for name, value in NO_MTP.items()}
    command = ["-m", "soli", "train", recipe_file(tmp_path, data, MANY), "--processes", "2", "--out", run]
    command += [f"--set={name}={value}" for name, value in changes.items()]
    agent = start(*command)
    wait_for_checkpoint(agent, run)
    victim = ranks_of(agent)[1]
    os.kill(victim, signal.SIGKILL)
    _, error = agent.communicate(timeout=WITHIN)
    assert agent.returncode == 1
    assert f"soli: rank 1 (process {victim}) was ended by SIGKILL" in error and "Traceback" not in error
    steps = saved_step(run) + 4
    agent = start(*command, "--set", f"schedule.constant_tokens={128 * steps}")
    _, error = agent.communicate(timeout=300)
    assert agent.returncode == 0 and saved_step(run) == steps, error
    model = AS_ONE_PROCESS["model"] | NO_MTP
    one = AS_ONE_PROCESS | {"model": model, "run": {"micro_sequences": MICRO}}
    train(prepare(settings(**one, schedule={"constant_tokens": 128 * steps}), {}, data, tmp_path / "one"))
    first, second = load_run(run).state_dict(), load_run(tmp_path / "one").state_dict()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": {"schedule": "2F2B"}}, r"parallel\.schedule is '2F2B'; choose one of 1F1B, Interleaved1F1B"),
        ({"parallel": {"schedule": "DualPipe"}}, r"'DualPipe'; did you mean DualPipeV"),
        ({"parallel": {"pipeline": 3}}, r"parallel\.pipeline is 3; schedule 1F1B has 3 stages, but the model 2 layers"),
        (
            {"parallel": {"pipeline": 2, "schedule": "ZBVZeroBubble"}},
            r"parallel\.pipeline is 2; schedule ZBVZeroBubble has 4 stages, 2 for each rank, but the model 2 layers",
        ),
        (
            {"run": {"micro_sequences": 8}},
            r"schedule\.batch_sequences gives each pipeline 8 sequences, 1 micro-batch of 8, but schedule 1F1B on 2 "
            r"ranks needs at least 2 micro-batches; change run\.micro_sequences",
        ),
        ({"run": {"micro_sequences": 3}}, r"2 micro-batches of 3 and one of 2, but all must be of equal size"),
        (
            {"parallel": {"pipeline": 2, "schedule": "dualpipev"}, "model": {"num_hidden_layers": 4}},
            r"schedule DualPipeV on 2 ranks needs at least 4 micro-batches",
        ),
        (
            {
                "parallel": {"pipeline": 2, "data": 2, "schedule": "DualPipeV"},
                "model": {"num_hidden_layers": 4},
                "run": {"micro_sequences": 1},
            },
            r"parallel\.keep_gathered is False; schedule DualPipeV computes gradients of weights after those of inputs",
        ),
        (
            {
                "parallel": {"pipeline": 2, "data": 2, "schedule": "ZBVZeroBubble", "keep_gathered": True},
                "model": NO_MTP | {"num_hidden_layers": 4, "tie_word_embeddings": True},
            },
            r"parallel\.schedule is 'ZBVZeroBubble'; .* tied embedding and head of two; choose 1F1B or Interleaved1F1B",
        ),
        (
            {
                "parallel": {"pipeline": 2, "expert": 2, "schedule": "ZBVZeroBubble", "keep_gathered": True},
                "model": {"num_hidden_layers": 4},
                "run": {"activation_checkpointing": True},
            },
            r"parallel\.schedule is 'ZBVZeroBubble'; with run\.activation_checkpointing each rank recomputes a block",
        ),
        (
            {
                "parallel": {"pipeline": 2, "schedule": "ZBVZeroBubble"},
                "model": {"num_hidden_layers": 4, "tie_word_embeddings": True},
            },
            r"is 'ZBVZeroBubble'; the last stage uses the embedding in 1 MTP modules and the tied head",
        ),
        (
            {
                "parallel": {"pipeline": 2, "schedule": "DualPipeV"},
                "model": {"num_hidden_layers": 4, "num_nextn_predict_layers": 2},
            },
            r"uses the embedding in 2 MTP modules, whose gradient",
        ),
        ({"parallel": {"pipeline": 2, "data": 4}}, r"each pipeline 2 sequences, 0 micro-batches of 4 and one of 2"),
        (
            {
                "parallel": {"pipeline": 2, "data": 2},
                "schedule": {"batch_sequences_start": 4, "batch_ramp_tokens": 1024},
                "run": {"micro_sequences": 1},
            },
            r"schedule\.batch_ramp_tokens is 1024; the ramp has batches of 5 .* --set schedule\.batch_ramp_multiple=2",
        ),
    ],
)
def test_what_does_not_fit_a_pipeline_is_refused_by_name(changes, words):
    with pytest.raises(SoliError, match=words):
        settings(**({"parallel": {"pipeline": 2}} | changes))


def test_a_ramp_in_multiples_can_be_shared_by_several_pipelines():
    """The paper's, too, on 8 stages of 32 ranks."""
    ramp = {"batch_sequences_start": 4, "batch_ramp_tokens": 1024, "batch_ramp_multiple": 2}
    recipe = settings(parallel={"pipeline": 2, "data": 2}, schedule=ramp, run={"micro_sequences": 1})
    assert ramp_batches(recipe.schedule) == [4, 6, 8]
    sizes = ["parallel.pipeline=8", "parallel.expert=32", "schedule.batch_ramp_multiple=32", "run.micro_sequences=1"]
    assert read_settings(load_recipe("671b", sizes)).parallel.world == 256


@pytest.mark.parametrize(("version", "schedules"), [("2.11.0+cu130", 2), ("2.12.1", 2), ("2.13.0", 4), ("2.14.0a0", 4)])
def test_schedules_whose_gradients_torch_computes_wrongly_are_refused(version, schedules):
    refused = []
    for schedule in SCHEDULES.values():
        try:
            check_torch(schedule, version)
        except SoliError as error:
            assert f"torch {version} computes wrongly; install torch 2.13 or newer, or choose 1F1B" in str(error)
            refused.append(schedule.name)
    assert refused == list(SCHEDULES)[schedules:]


def test_names_of_schedules_are_torchs_in_any_case():
    for name in SCHEDULES:
        assert get_schedule_class(name) and find_schedule(name.lower()) is SCHEDULES[name]
    assert settings(parallel={"pipeline": 2, "schedule": "1f1b"}).parallel.world == 2


@pytest.mark.parametrize("preset", ["deepseek-v3", "deepseek-v2-lite", "kimi-k2"])
def test_layers_are_divided_evenly_in_cost(preset):
    """No division has a cheaper most expensive stage than the one found: none of those that move a border by one."""
    config = resolve(preset)
    costs, last = layer_costs(config)

    def largest(parts: list[range]) -> int:
        return max(sum(costs[layer] for layer in part) + last * (part is parts[-1]) for part in parts)

    for stages in (2, 4, 8, 16):
        parts = list(divide_layers(config, stages))
        assert [layer for part in parts for layer in part] == list(range(config.num_hidden_layers))
        for border in range(1, stages):
            for move in (-1, 1):
                moved = [range(part.start, part.stop) for part in parts]
                edge = parts[border].start + move
                moved[border - 1 : border + 1] = [range(parts[border - 1].start, edge), range(edge, parts[border].stop)]
                if all(moved):
                    assert largest(moved) >= largest(parts)
    assert len(divide_layers(config, 2)[1]) < len(divide_layers(config, 2)[0])  # the last stage has head and MTP too
