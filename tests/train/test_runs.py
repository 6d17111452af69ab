"""Runs read back: resumed and truncated files, states, common points, errors by line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soli.errors import SoliError
from soli.train.runs import MEASURES, compare_runs, find_runs, read_metrics, save_curves, summarize
from soli.train.settings import as_recipe
from tests.train.toy import settings


def step(step: int, loss: float = 3.0, violation: float = 1.0, tokens: int | None = None) -> dict:
    load = {"layers.1": {"max_violation": violation}, "mtp.0": {"max_violation": violation / 2}}
    tokens = 128 * step if tokens is None else tokens
    metrics = {"loss": loss, "mtp": loss + 1, "tokens_per_second": 64.0, "load": load}
    return {"kind": "step", "step": step, "tokens": tokens, "seconds": 2.0 * step, **metrics}


def evaluation(step: int, loss: float = 3.5) -> dict:
    head = {"kind": "evaluation", "step": step, "tokens": 128 * step, "seconds": 2.0 * step}
    return {**head, "loss": loss, "bits_per_byte": loss / 2, "samples": [["one\u2028line", "x"]]}


def end(step: int, why: str) -> dict:
    return {"kind": "end", "step": step, "tokens": 128 * step, "seconds": 2.0 * step, "why": why}


def write_run(folder: Path, lines: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / "metrics.jsonl", (then, then))


def test_steps_recorded_twice_are_read_once(tmp_path):
    lines = [
        step(1),
        step(2),
        evaluation(2),
        step(3, 9.0),
        evaluation(3),
        step(2, 2.0),
        evaluation(2, 2.5),
        step(3, 1.0),
    ]
    metrics = read_metrics(write_run(tmp_path, lines, tail='{"kind": "step", "st'))
    assert metrics.curve("loss") == [(128, 3.0), (256, 2.0), (384, 1.0)]
    assert metrics.curve("held-out loss") == [(256, 2.5)]


def test_a_summary_has_the_last_values_of_a_run(tmp_path):
    summary = summarize(read_metrics(write_run(tmp_path, [step(1), step(2, 2.0), evaluation(2, 2.5)])))
    assert (summary.step, summary.tokens, summary.seconds, summary.state) == (2, 256, 4.0, "running")
    assert (summary.loss, summary.heldout_loss, summary.bits_per_byte) == (2.0, 2.5, 1.25)
    assert summary.tokens_per_second == pytest.approx(64)
    empty = summarize(read_metrics(write_run(tmp_path / "new", [])))
    assert (empty.step, empty.loss, empty.tokens_per_second) == (0, None, None)


@pytest.mark.parametrize(
    ("lines", "seconds", "state"),
    [
        ([step(1), end(1, "finished")], 0, "finished"),
        ([step(1), end(1, "signal")], 0, "stopped"),
        ([step(1), end(1, "signal"), step(2)], 30, "running"),
        ([step(1), step(2)], 61, "stopped"),
        ([step(10), step(60)], 150, "running"),  # two reports are 100 s apart
        ([step(12)], 3600, "finished"),  # the whole schedule of the recipe, without an end line
    ],
)
def test_states_of_a_run(tmp_path, lines, seconds, state):
    write_run(tmp_path, lines)
    (tmp_path / "recipe.resolved.json").write_text(json.dumps(as_recipe(settings(), {}) | {"packed": {}}))
    age(tmp_path, seconds)
    assert summarize(read_metrics(tmp_path)).state == state


def test_points_are_at_the_last_common_tokens(tmp_path):
    first = [step(n, 5.0 - n, 2.0) for n in range(1, 5)] + [evaluation(4, 1.0)]
    second = [step(1, 4.0, 1.0, tokens=100), evaluation(1, 3.0), step(2, 2.0, 1.0, tokens=300)]
    runs = [read_metrics(write_run(tmp_path / name, lines)) for name, lines in (("a", first), ("b", second))]
    points = {point.measure: point for point in compare_runs(runs)}
    assert list(points) == list(MEASURES)
    loss = points["loss"]
    assert loss.tokens == 300 and loss.values == pytest.approx([5 - 300 / 128, 2.0])  # interpolated
    assert loss.differences == pytest.approx([0.0, 300 / 128 - 3])
    assert points["max violation"].values == [2.0, 1.0]  # of the worst layer
    assert points["held-out loss"].tokens is None and points["held-out loss"].values == [None, None]


def test_a_model_without_modules_has_neither_mtp_loss_nor_violation(tmp_path):
    plain = read_metrics(write_run(tmp_path, [step(1) | {"mtp": 0.0, "load": {}}]))
    assert plain.curve("MTP loss") == [] and plain.curve("max violation") == []


def test_curves_are_drawn(tmp_path):
    runs = [read_metrics(write_run(tmp_path / name, [step(1), step(2), evaluation(2)])) for name in "ab"]
    save_curves(tmp_path / "x.png", runs, ["a", "b"])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '{"kind": "step"}', json.dumps(step(1) | {"loss": "low"}), json.dumps(step(1) | {"load": [1]})],
)
def test_a_line_of_something_else_is_rejected_by_number(tmp_path, line):
    write_run(tmp_path, [step(1)], tail=line + "\n")
    with pytest.raises(SoliError, match="line 2 is not what soli train writes"):
        read_metrics(tmp_path)


def test_runs_are_folders_with_metrics(tmp_path):
    run = write_run(tmp_path / "a", [])
    (tmp_path / "b").mkdir()
    assert find_runs(tmp_path) == [run] and find_runs(run) == [run]
    with pytest.raises(SoliError, match="there is no folder"):
        find_runs(tmp_path / "c")


def test_reading_runs_needs_no_torch(tmp_path):
    write_run(tmp_path / "a", [step(1)])
    code = "import sys, soli.cli; soli.cli.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, "runs", "list", str(tmp_path)]).returncode == 0
