"""The ablations: arms that are equal where they say so, runs that go on where they stopped, two steps of one arm."""

import sys
from pathlib import Path

import pytest

from soli.analysis.parameters import count
from tests.train.toy import write_data

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from ablations import arms, run

TOKENS = 409_600


def test_arms_activate_as_many_parameters_and_spend_what_they_say() -> None:
    arms.check_equal(TOKENS)
    dense, more = (arms.arm_settings(name, TOKENS) for name in ("dense", "no-mtp-more"))
    assert count(dense.model).activated == count(arms.arm_settings(arms.BASELINE, TOKENS).model).activated
    assert count(dense.model).total == count(dense.model).activated
    assert more.schedule.total_tokens > 1.5 * TOKENS


def test_an_arm_that_activates_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wider = arms.Arm("wider", {"model.moe_intermediate_size": 80})
    monkeypatch.setitem(arms.ARMS, "wider", wider)
    with pytest.raises(AssertionError, match="wider activates"):
        arms.check_equal(TOKENS)


def test_every_arm_belongs_to_an_experiment_and_none_is_trained_twice() -> None:
    assert run.chosen_arms(sorted(arms.EXPERIMENTS)) == list(arms.ARMS)
    assert run.chosen_arms(["a", "b"]) == ["baseline", "dense", "auxiliary", "neither"]


def test_finished_runs_are_left_out_and_those_of_another_length_are_not(tmp_path: Path) -> None:
    file = tmp_path / "finished.jsonl"
    run.add_line(file, {"arm": "dense", "seed": 0, "budget": 10})
    run.add_line(file, {"arm": "baseline", "seed": 1, "budget": 99})
    left = [("baseline", 0), ("baseline", 1), ("dense", 1)]
    assert list(run.missing(file, ["baseline", "dense"], seeds=2, tokens=10)) == left


def test_two_steps_of_an_arm(tmp_path: Path) -> None:
    settings = arms.arm_settings(arms.BASELINE, 2 * 16 * 128, seed=1)
    found = run.train_arm(settings, write_data(tmp_path / "data"))
    assert found["steps"] == 2 and found["tokens"] == 4096
    assert 0 < found["loss"] < 9 and 0 <= found["mtp_acceptance"] <= 1
    assert found["train_violation"] > 0 and found["heldout_violation"] > 0 and found["heldout_idle"] <= 3 * 32


def test_the_dry_run_lists_the_arms(capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--experiment", "c", "--dry-run"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "arm",
        "baseline",
        "no-mtp",
        "no-mtp-more",
    ]
