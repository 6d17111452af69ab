"""The ablations: arms that are equal where they claim to be, runs that resume, two steps of one arm."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from soli.analysis.parameters import count
from tests.train.toy import write_data

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from ablations import arms, run, summary

TOKENS = 409_600


def test_arms_activate_as_many_parameters_and_spend_what_they_say() -> None:
    arms.check_equal(TOKENS)
    dense, more, nano = (arms.arm_settings(name, TOKENS) for name in ("dense", "no-mtp-more", "nano"))
    assert nano.model.hidden_size == 256 and nano.model.num_nextn_predict_layers == 0
    assert count(dense.model).activated == count(arms.arm_settings(arms.BASELINE, TOKENS).model).activated
    assert count(dense.model).total == count(dense.model).activated
    assert more.schedule.total_tokens > 1.5 * TOKENS


def test_an_arm_that_activates_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wider = arms.Arm("wider", {"model.moe_intermediate_size": 80})
    monkeypatch.setitem(arms.ARMS, "wider", wider)
    with pytest.raises(AssertionError, match="wider activates"):
        arms.check_equal(TOKENS)


def test_every_arm_belongs_to_an_experiment_and_none_is_trained_twice() -> None:
    assert run.selected_arms(sorted(arms.EXPERIMENTS)) == list(arms.ARMS)
    assert run.selected_arms(["a", "b"]) == ["baseline", "dense", "auxiliary", "neither"]


def test_finished_runs_are_left_out_and_those_of_another_length_are_not(tmp_path: Path) -> None:
    file = tmp_path / "finished.jsonl"
    run.add_line(file, {"arm": "dense", "seed": 0, "budget": 10})
    run.add_line(file, {"arm": "baseline", "seed": 1, "budget": 99})
    left = [("baseline", 0), ("baseline", 1), ("dense", 1)]
    assert list(run.missing(file, ["baseline", "dense"], seeds=2, tokens=10)) == left


def test_two_steps_of_an_arm(tmp_path: Path) -> None:
    settings = arms.arm_settings(arms.BASELINE, 2 * 16 * 128, seed=1)
    metrics = run.train_arm(settings, write_data(tmp_path / "data"))
    assert metrics["steps"] == 2 and metrics["tokens"] == 4096
    assert 0 < metrics["loss"] < 9 and 0 <= metrics["mtp_acceptance"] <= 1
    assert metrics["train_violation"] > 0 and metrics["heldout_violation"] > 0 and metrics["heldout_idle"] <= 3 * 32


def test_the_dry_run_lists_the_arms(capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--experiment", "c", "--dry-run"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "arm",
        "baseline",
        "no-mtp",
        "no-mtp-more",
    ]


def finished(arm: str, seed: int, loss: float, **more: float) -> dict[str, Any]:
    """A line as run.py leaves it."""
    return {"arm": arm, "seed": seed, "budget": TOKENS, "commit": "c", "loss": loss, "bits_per_byte": loss / 2, **more}


def test_arms_are_compared_seed_by_seed() -> None:
    # Seeds far apart, arms close by: only pairs can tell them.
    lines = [finished("dense", seed, loss) for seed, loss in ((0, 4.0), (1, 5.0), (2, 6.0))]
    lines += [finished("baseline", seed, loss) for seed, loss in ((2, 5.8), (1, 4.9), (0, 3.7))]
    lines += [finished("baseline", 0, 99.0) | {"budget": 1}]
    experiment = summary.summarise(summary.by_arm(lines, TOKENS))["a"]
    assert list(experiment["arms"]) == ["dense", "baseline"] and "loss_less_first" not in experiment["arms"]["dense"]
    baseline = experiment["arms"]["baseline"]
    assert baseline["loss"]["mean"] == pytest.approx(4.8)
    assert baseline["loss"]["deviation"] == pytest.approx(1.0536, abs=1e-4)
    pairs = baseline["loss_less_first"]
    assert pairs["mean"] == pytest.approx(-0.2) and pairs["interval"] == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert "train_violation" not in baseline


def test_one_seed_has_no_interval_and_unpaired_seeds_no_difference() -> None:
    lines = [finished("dense", 0, 4.0), finished("baseline", 1, 3.0)]
    baseline = summary.summarise(summary.by_arm(lines, TOKENS))["a"]["arms"]["baseline"]
    assert baseline["loss"] == {"mean": 3.0, "deviation": None, "interval": None, "seeds": 1}
    assert "loss_less_first" not in baseline


def test_the_summary_writes_tables_json_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(summary.record, "RESULTS", tmp_path)
    for number, arm in enumerate(arms.ARMS):
        for seed in range(3):
            load = {} if arm == "dense" else {"train_violation": 0.5, "heldout_violation": 1.5, "heldout_idle": 2}
            run.add_line(tmp_path / "lines.jsonl", finished(arm, seed, 5 + 0.1 * number + 0.01 * seed, **load))
    summary.main(["--finished", str(tmp_path / "lines.jsonl"), "--picture", str(tmp_path / "e.png")])
    result = json.loads((tmp_path / "ablations.json").read_text())
    assert result["hardware"]["commit"] == "c" and len(result["runs"]) == 3 * len(arms.ARMS)
    assert result["arms"]["no-mtp-more"]["flops"] == pytest.approx(result["arms"]["baseline"]["flops"], rel=0.01)
    assert [len(one["arms"]) for one in result["experiments"].values()] == [2, 3, 3, 3, 5, 2, 11]
    row = "| neither bias nor auxiliary loss | 5.310 ± 0.025 | +0.100 ± 0.000 | 2.655 | 0.50 / 1.50 | – / 2.0 | – |"
    assert row in capsys.readouterr().out
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_no_runs_are_no_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        summary.main(["--finished", str(tmp_path / "none.jsonl")])
    assert "train with run.py first" in capsys.readouterr().err
