"""A plan adds up, agrees with the paper where the recipe is the paper's, and is printed for every shipped recipe."""

import json
import subprocess
import sys

import pytest

from soli.cli import main
from soli.data.recipe import load_recipe
from soli.plan.schedule_plot import schedule_rows
from soli.plan.training import STEP_SHARE, plan_run
from soli.train.settings import read_settings
from tests.train.toy import settings


def test_the_plan_of_the_papers_run():
    plan = plan_run(read_settings(load_recipe("671b")), devices=2048, mfu=0.4, device_tflops=989)
    assert [phase.name for phase in plan.phases[:3]] == ["warm-up", "constant", "cosine"]
    assert sum(phase.tokens for phase in plan.phases[:5]) == 14_800 * 10**9
    assert plan.phases[0].steps == 2000 and [phase.steps for phase in plan.phases[5:]] == [1000, 1000]
    assert plan.gpu_hours == pytest.approx(plan.paper_gpu_hours, rel=0.15)  # the paper states no MFU; 0.4 is near it


def test_the_plan_of_a_toy_by_hand():
    plan = plan_run(settings(), devices=2, mfu=0.5, device_tflops=1)
    (phase,) = plan.phases
    assert (phase.name, phase.tokens, phase.steps, phase.batch_sequences) == ("constant", 12 * 128, 12, (8, 8))
    assert plan.memory.states == pytest.approx(8 * plan.parameters, abs=100) and plan.paper_gpu_hours is None
    assert plan.gpu_hours == pytest.approx(plan.flops / 0.5e12 / 3600)


@pytest.mark.parametrize("recipe", ["nano-zh-en", "nano-gpu", "one-gpu", "16b", "671b"])
def test_every_shipped_recipe_is_planned(recipe, capsys):
    assert main(["train", recipe, "--dry-run", "--no-measure"]) == 0
    printed = capsys.readouterr().out
    assert "cosine" in printed and ("H800-hours" in printed) == (recipe == "671b")
    assert main(["train", recipe, "--dry-run", "--no-measure", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert read_settings({**document["recipe"], "data": {}}) == read_settings(load_recipe(recipe))


def test_a_plan_needs_no_torch():
    plan = "main(['train', '671b', '--dry-run', '--no-measure'])"
    code = f"import sys; from soli.cli import main; {plan}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_the_schedules_are_drawn(tmp_path, capsys):
    rows = schedule_rows(read_settings(load_recipe("671b")))
    assert [rows[0][2:], rows[-1][1:4]] == [(3072, 4096, 1e-3, 0.3), (7.3e-6, 480, 131072)]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert main(["train", "671b", "--dry-run", "--no-measure", "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert main(["train", "671b", "--json"]) == 2


def test_every_number_of_the_papers_table_is_printed(capsys):
    assert main(["train", "671b", "--dry-run", "--no-measure"]) == 0
    printed = capsys.readouterr().out
    for number in (
        "betas 0.9 / 0.95",
        "decay 0.1 but for norms and biases",
        "clip 1",
        "deviation 0.006",
        "3,072 -> 15,360 sequences over 469,000,000,000 tokens",
        "gamma 0.001 until 14,300,000,000,000 tokens, then 0; alpha 0.0001",
        "depth 1, lambda 0.3 until 10,000,000,000,000 tokens, then 0.1",
        "fill-in-the-middle rate 0.1",
        "factor 40 of 4,096, beta 32 / 1",
        "333,000,000,000",
        "167,000,000,000",
        "131,072",
        "7.30e-06",
    ):
        assert number in printed, number


def test_this_device_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("soli.plan.throughput.SECONDS", 0.001)
    assert main(["train", "nano-zh-en", "--dry-run", "--json", "--set", "run.device=cpu"]) == 0
    document = json.loads(capsys.readouterr().out)
    device, plan = document["device"], document["plan"]
    assert device["kind"] == "cpu" and device["tflops"] > 0 and plan["precision"] == device["computes"]
    share = STEP_SHARE[device["precision"]]
    assert device["hours"] == pytest.approx(plan["flops"] / (3600e12 * share * device["tflops"]))
    assert main(["train", "nano-zh-en", "--dry-run", "--set", "run.device=cpu"]) == 0
    assert "TFLOP/s measured on products" in capsys.readouterr().out


def test_cards_are_known_by_name():
    from soli.plan.throughput import stated_peak

    names = (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA GeForce RTX 4090",
        "Tesla T4",
    )
    assert [stated_peak(name) for name in names] == [989, 756, 312, 165, None]
