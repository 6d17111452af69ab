"""The plan of a mesh adds up, agrees with shards that FSDP2 makes, and is printed."""

import itertools
import json
from dataclasses import replace
from functools import cache

import pytest

from soli.analysis.parameters import count
from soli.cli import main
from soli.data.recipe import load_recipe
from soli.errors import SoliError
from soli.plan.device_load import imbalance, rank_parameters
from soli.plan.devices import DEVICES, find_device
from soli.plan.mesh import MARGIN, papers_plan, plan_mesh
from soli.plan.mesh_proposal import Proposal, propose_mesh
from soli.plan.mesh_sizes import MeshSizes
from soli.plan.training import PAPER_GPU_HOURS, plan_run
from soli.train.settings import TrainSettings, read_settings
from tests.train.toy import settings

H800 = DEVICES["h800"]


def of_paper() -> tuple[TrainSettings, float]:
    recipe = read_settings(load_recipe("671b"))
    return recipe, plan_run(recipe, 2048, 0.4, 989).flops


@cache
def proposed(devices: int, device: str = "h800") -> Proposal:
    """Of the paper's recipe."""
    proposal = propose_mesh(of_paper()[0], devices, DEVICES[device], "bf16")
    assert proposal is not None
    return proposal


def test_the_papers_run_fits_2048_h800():
    recipe, _ = of_paper()
    plan = proposed(2048).plan
    sizes = plan.sizes
    assert sizes.data * sizes.expert * sizes.pipeline * sizes.replicate == 2048
    assert plan.fits and plan.total <= MARGIN * H800.memory
    assert 256 % sizes.expert == 0 and recipe.schedule.batch_sequences % sizes.ranks == 0
    assert 0 < plan.mfu[0] < plan.expected_mfu < plan.mfu[1] < 0.5
    assert plan.gpu_hours[1] < plan.expected_gpu_hours < plan.gpu_hours[0]
    assert sizes.pipeline > 1
    assert plan.bubble == pytest.approx((sizes.pipeline - 1) / (15360 // sizes.ranks + sizes.pipeline - 1))


@pytest.mark.slow
def test_more_memory_needs_no_slower_mesh():
    h800, h200 = (proposed(2048, name).plan for name in ("h800", "h200"))
    assert sum(h200.seconds) <= sum(h800.seconds)


def test_the_papers_choices_take_the_papers_plan():
    """The figure that calibrates the plan; it lies between the best and the worst case."""
    recipe, _ = of_paper()
    plan = papers_plan(recipe)
    assert plan.expected_gpu_hours == pytest.approx(PAPER_GPU_HOURS, rel=0.03)
    assert plan.gpu_hours[1] < 0.9 * PAPER_GPU_HOURS and plan.gpu_hours[0] > 1.1 * PAPER_GPU_HOURS
    assert plan.bubble < 0.05 and plan.sizes.pipeline == 16


@pytest.mark.slow
def test_more_devices_take_less_time():
    """And more GPU-hours for their bubble, until a faster mesh has the memory: experts within a machine."""
    plans = {devices: proposed(devices).plan for devices in (512, 1024, 2048)}
    assert all(plan.fits for plan in plans.values())
    assert plans[512].expected_seconds > plans[1024].expected_seconds > plans[2048].expected_seconds
    assert plans[512].expected_gpu_hours < plans[1024].expected_gpu_hours > plans[2048].expected_gpu_hours
    assert plans[1024].sizes.expert > 8 == plans[2048].sizes.expert


@pytest.mark.slow
def test_faster_devices_take_less_time():
    plans = [proposed(2048, name).plan for name in ("a100", "h800", "h200", "b200")]
    for slower, faster in itertools.pairwise(plans):
        assert faster.expected_seconds < slower.expected_seconds and sum(faster.seconds) < sum(slower.seconds)


def test_a_rank_has_the_layers_that_the_trainer_gives_it():
    recipe, _ = of_paper()
    for sizes in (MeshSizes(2, 64), MeshSizes(1, 1, 8), MeshSizes(1, 1, 16, schedule="DualPipeV")):
        ranks = rank_parameters(recipe.model, sizes)
        copies = (sizes.pipeline > 1 and sizes.schedule == "1F1B") * 129280 * 7168  # of the embedding, for MTP
        total = count(recipe.model, mtp=True).total + copies
        assert sum(rank.total for rank in ranks) == pytest.approx(total, rel=1e-6)
        assert sum(rank.blocks for rank in ranks) == pytest.approx(1) and len(ranks) == sizes.pipeline
    assert imbalance(recipe.model, MeshSizes(2, 64)) == 1
    assert 1 < imbalance(recipe.model, MeshSizes(1, 1, 8)) < imbalance(recipe.model, MeshSizes(1, 1, 16)) < 1.5


@pytest.mark.parametrize(
    ("devices", "device"), [(2048, "h800"), pytest.param(1024, "h200", marks=pytest.mark.slow), (37, "h800")]
)
def test_the_trainer_accepts_what_is_proposed_in_every_phase(devices, device, capsys):
    """With the printed options the recipe's own mesh is for so many devices, whether it fits them or not."""
    command = ["train", "671b", "--dry-run", "--no-measure", "--devices", str(devices), "--device", device]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["proposal"]["memory_of_stages"]) == 3
    assert document["proposal"]["memory_of_stages"][0] == sum(document["mesh"]["memory"].values())
    values = {field: json.dumps(value).strip('"') for field, value in document["proposal"]["changes"].items()}
    assert main([*command, "--json", *(f"--set={field}={value}" for field, value in values.items())]) == 0
    own = json.loads(capsys.readouterr().out)
    assert "proposal" not in own and own["mesh"] == document["mesh"]


def test_batches_that_no_mesh_takes_are_named_with_those_that_would_do(capsys):
    assert main(["train", "671b", "--dry-run", "--no-measure", "--devices", "2048"]) == 0
    printed = capsys.readouterr().out
    assert "no mesh of 2,048 devices that fits takes the recipe's in all phases" in printed
    assert "extension[1].batch_sequences is 480; the 128 processes" in printed
    assert "--set extension.1.batch_sequences=2048 --set extension.1.steps=235" in printed  # as many tokens
    assert "in extension phase 2, which does not fit a device h800: each device has a whole sequence" in printed
    start = ["--set", "schedule.batch_sequences_start=16"]
    assert main(["train", "nano-zh-en", "--dry-run", "--no-measure", "--devices", "4", *start]) == 0
    printed = capsys.readouterr().out
    assert "no mesh of" not in printed and "soli train accepts it for every phase with --set parallel." in printed


def test_batches_of_pretraining_change_only_where_no_mesh_takes_them():
    recipe, _ = of_paper()
    for devices in (512, 2048):
        schedule = proposed(devices).settings.schedule
        assert replace(schedule, batch_ramp_multiple=1) == recipe.schedule
    changed = propose_mesh(recipe, 37, H800, "bf16")
    assert not changed.plan.fits and changed.settings.schedule.batch_sequences == 15392  # 416 x 37
    assert changed.refusals[0].startswith("schedule.batch_sequences is 15360; the 37 processes")


def test_precision_is_chosen_where_the_recipe_leaves_it_open():
    toy = settings(run={"precision": "auto"})
    for name, precision in (("h800", "fp8"), ("a100", "bf16")):
        proposal = propose_mesh(toy, 4, DEVICES[name], "bf16")
        assert proposal.plan.precision == precision
        assert ("run.precision" in proposal.changes) == (precision == "fp8")
    fixed = propose_mesh(settings(run={"precision": "bf16"}), 4, H800, "bf16")
    assert fixed.plan.precision == "bf16" and "run.precision" not in fixed.changes


@pytest.mark.slow
def test_hours_are_added_up_from_their_causes(capsys):
    recipe, _ = of_paper()
    for plan in (proposed(2048).plan, papers_plan(recipe)):
        assert sum(plan.hours_by_cause.values()) == pytest.approx(plan.expected_gpu_hours)
    assert main(["train", "671b", "--dry-run", "--no-measure", "--devices", "2048"]) == 0
    printed = capsys.readouterr().out
    assert "more than the paper's choices: 745.9 K for bf16 instead of FP8" in printed


def test_experts_within_a_machine_send_faster():
    """As many rows leave a device, over links of the machine instead of the network."""
    recipe, operations = of_paper()
    near, far = (plan_mesh(recipe, MeshSizes(128 // n, n, 16, keep_gathered=True), H800, "bf16", operations)
                 for n in (8, 64))  # fmt: skip
    assert near.traffic["tokens to experts"] > 0.85 * far.traffic["tokens to experts"]
    assert near.seconds[0] < far.seconds[0] and near.seconds[1] <= far.seconds[1]


def test_bytes_by_hand():
    """Two ranks, one micro-batch of 8 x 16 tokens: rings send half of everything once per gather and reduction."""
    toy = settings(run={"micro_sequences": 4}, parallel={"data": 2})
    plan = plan_mesh(toy, MeshSizes(2, 1), H800, "fp32", 1e15)
    parameters = plan_run(toy, 1, 0.4, 1).parameters
    ends = plan.traffic["adding gradients"]
    assert ends == pytest.approx(4 * parameters / 2, rel=0.01)
    assert set(plan.traffic) == {"gathering parameters", "adding gradients"}
    shared = plan_mesh(toy, MeshSizes(1, 2), H800, "fp32", 1e15)
    rows = 4 * 16 * 2 * 32 * 4 / 2  # tokens, experts of a token, width, bytes, half of them elsewhere
    assert shared.traffic["tokens to experts"] == 4 * 2 * rows  # there and back, twice, in two layers
    assert shared.traffic["adding gradients"] < plan.traffic["adding gradients"]


def test_gathering_once_a_step_sends_less_and_holds_more():
    recipe, operations = of_paper()
    sizes = MeshSizes(8, 16)
    often = plan_mesh(recipe, sizes, H800, "bf16", operations)
    once = plan_mesh(recipe, replace(sizes, keep_gathered=True), H800, "bf16", operations)
    assert once.traffic["adding gradients"] * 120 == pytest.approx(often.traffic["adding gradients"], rel=1e-6)
    assert once.memory["gathered blocks"] > often.memory["gathered blocks"]


def test_devices_that_no_mesh_divides_are_named(capsys):
    assert main(["train", "671b", "--dry-run", "--no-measure", "--devices", "37"]) == 0
    assert "schedule.batch_sequences is 15360; the 37 processes" in capsys.readouterr().out
    assert main(["train", "671b", "--dry-run", "--no-measure", "--devices", str(10**9)]) == 0
    assert "no sizes of 1,000,000,000 devices can share the recipe's batch" in capsys.readouterr().out
    with pytest.raises(SoliError, match=r"--device h8000 is not known; did you mean h800\?"):
        find_device("h8000")


@pytest.mark.slow
def test_the_mesh_is_printed(capsys):
    command = ["train", "671b", "--dry-run", "--no-measure", "--devices", "2048", "--device", "h800"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for label in ("mesh", "on each", "sends", "bubble", "MFU", "GPU-hours"):
        assert f"\n{label} " in printed
    assert main([*command, "--json"]) == 0
    mesh = json.loads(capsys.readouterr().out)["mesh"]
    assert mesh["fits"] is True and mesh["sizes"]["expert"] > 1 and mesh["traffic"]["tokens to experts"] > 0


def test_a_recipes_own_mesh_is_planned(capsys):
    own = ["--set", "parallel.data=2", "--set", "parallel.expert=2", "--set", "schedule.batch_sequences_start=16"]
    assert main(["train", "nano-zh-en", "--dry-run", "--no-measure", "--devices", "4", *own]) == 0
    assert "data 2 x expert 2" in capsys.readouterr().out


def test_a_recipes_own_pipeline_schedule_is_planned(capsys):
    own = ["--set", "parallel.pipeline=2", "--set", "parallel.schedule=interleaved1f1b"]
    own += ["--set", "run.micro_sequences=4", "--set", "schedule.batch_ramp_multiple=8"]
    assert main(["train", "nano-zh-en", "--dry-run", "--no-measure", "--devices", "2", *own]) == 0
    assert "pipeline 2 (Interleaved1F1B)" in capsys.readouterr().out


SHARDS = """
import sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from soli.data.recipe import load_recipe
from soli.model.transformer import Transformer
from soli.parallel.mesh import build_meshes
from soli.parallel.ranks import local_tensor
from soli.parallel.sharding import shard_model
from soli.train.settings import read_settings

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2048)
model = Transformer(read_settings(load_recipe("671b")).model, device="meta", dtype=torch.float32)
shard_model(model, build_meshes(32, 64, 1, "cpu"))
print(sum(local_tensor(p).numel() for p in model.parameters()))
"""


@pytest.mark.slow
def test_shards_of_2048_ranks_are_the_planned_ones():
    """671 B on the meta device, over a fake process group: what rank 0 would store."""
    import subprocess
    import sys

    stored = int(subprocess.run([sys.executable, "-c", SHARDS], check=True, capture_output=True, text=True).stdout)
    recipe, operations = of_paper()
    plan = plan_mesh(recipe, MeshSizes(32, 64), H800, "bf16", operations)
    assert 4 * stored == pytest.approx(plan.memory["weights"], rel=0.02)
