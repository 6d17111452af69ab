"""What a run reports: each step once however often it is resumed, events, the view and the plain lines."""

import io
import json
import shutil
import sys

import pytest
from rich.console import Console

from soli.errors import SoliError
from soli.machine import processor
from soli.train.balance import ExpertLoad
from soli.train.evaluate import Evaluation
from soli.train.report import MAX_LAYERS, WIDTH, LiveView, MetricsFile, RunReport, bar, scalars
from soli.train.run_folder import RunProgress, checkpoints
from soli.train.runs import read_metrics, summarize
from soli.train.setup import prepare
from soli.train.trainer import train
from tests.train.toy import settings, write_data

METRICS = {"loss": 3.25, "mtp": 4.5, "balance": 2.0, "lr": 1e-3, "norm": 0.5, "tokens_per_second": 1234.0}


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_resumed_from_an_earlier_checkpoint_records_each_step_once(tmp_path):
    data, run = write_data(tmp_path / "data"), tmp_path / "run"
    train(prepare(settings(), {}, data, run))
    whole = lines(run)
    assert [line["kind"] for line in whole[-2:]] == ["evaluation", "end"] and whole[-1]["why"] == "finished"
    for late in checkpoints(run)[1:]:  # killed before it was saved, and in the middle of a line
        shutil.rmtree(late)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    resumed = prepare(settings(), {}, data, run)
    resumed_from = resumed.progress.step
    assert 0 < resumed_from < 12
    train(resumed)
    begun = [line for line in lines(run) if line["kind"] == "begin"]
    assert [line["step"] for line in begun] == [0, resumed_from] and begun[0]["processor"] == processor().name
    recorded = [(line["kind"], line["step"], line.get("loss")) for line in lines(run) if line["kind"] != "begin"]
    assert recorded == [(line["kind"], line["step"], line.get("loss")) for line in whole if line["kind"] != "begin"]
    assert summarize(read_metrics(run)).state == "finished"


def test_a_file_without_stale_lines_is_not_rewritten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind":"step","step":2, "text":"a\u2028b"}\n', encoding="utf-8")
    before = file.stat().st_ino, file.read_bytes()
    MetricsFile(tmp_path, 2).close()
    assert (file.stat().st_ino, file.read_bytes()) == before
    MetricsFile(tmp_path, 1).close()
    assert file.read_bytes() == b""


def test_event_files_hold_the_numbers_of_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = write_data(tmp_path / "data")
    train_settings = settings(run={"tensorboard": True}, schedule={"constant_tokens": 128 * 4})
    train(prepare(train_settings, {}, data, tmp_path / "run"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = {}
    for line in lines(tmp_path / "run"):
        for tag, value in scalars(line):
            expected.setdefault(tag, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    assert {"train/loss", "held-out/bits_per_byte", "max_violation/layers.1", "dead_experts/mtp.0"} <= expected.keys()
    assert sorted(events.Tags()["scalars"]) == sorted(expected)
    for tag, points in expected.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == points


def test_missing_tensorboard_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SoliError, match=r"pip install tensorboard$"):
        MetricsFile(tmp_path, 0, tensorboard=True)
    with pytest.raises(SoliError, match=r"run\.tensorboard is 1; it must be true or false"):
        settings(run={"tensorboard": 1})


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_in_a_pipe_and_a_view_on_a_terminal(tmp_path, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, soft_wrap=True, color_system=None)
    loads = {"layers.1": ExpertLoad(0.5, 0.875, 0), "mtp.0": ExpertLoad(9.0, 0.5, 3)}
    with RunReport(tmp_path, 2_000_000, RunProgress(), console) as report:
        report.evaluation(RunProgress(9, 900_000), Evaluation(3.0, 1.75, 0.5), [("one", "yi")], 2.0)
        report.step(RunProgress(10, 1_000_000), METRICS, loads, log=True)
        report.step(RunProgress(11, 1_100_000), METRICS, loads, log=False)
    output = out.getvalue()
    assert "held-out at step 9: loss 3.0000  1.7500 bits/byte  mtp hits 50.0 %  (2.0 s)" in output
    line = "loss 3.2500  mtp 4.5000  lr 1.00e-03  norm 0.50  violation 9.00  dead 3    1,234 tok/s"
    assert (line in output) is not terminal
    assert ("step 11" in output and "bits/byte 1.7500" in output and "▪▪▪" in output) is terminal
    assert [entry["step"] for entry in lines(tmp_path)] == [9, 10]


def test_bars_and_the_worst_layers():
    assert bar(0.0) == " " * WIDTH and bar(0.5) == "█" * 5 + " " * 5 and bar(7.0) == "█" * WIDTH
    assert bar(0.0125) == "▏" + " " * (WIDTH - 1)
    loads = {f"layers.{n}": ExpertLoad(n / 10, 1.0, 0) for n in range(20)}
    view, out = LiveView(100, RunProgress(1, 10), METRICS, loads, time_left="0:01:00"), io.StringIO()
    Console(file=out, width=120).print(view)
    assert f"worst {MAX_LAYERS} of 20 layers" in out.getvalue()
    assert "layers.19" in out.getvalue() and "layers.7 " not in out.getvalue()
