"""`soli runs`: tables, JSON, the picture, and what it rejects."""

import json

import pytest

from soli.cli import main
from tests.train.test_runs import end, evaluation, step, write_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", [step(1, 4.0), step(2, 3.0), evaluation(2, 3.5), end(2, "finished")])
    write_run(tmp_path / "runs" / "b", [step(1, 4.5), step(2, 3.25), evaluation(2, float("nan"))])
    return tmp_path


def test_list(folder, capsys):
    assert main(["runs", "list"]) == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("runs/"))
    assert first == ["runs/a", "finished", "2", "0.00", "3.0000", "3.5000", "1.7500", "64"]
    assert second[1] == "running" and second[5:7] == ["-", "-"]


def test_list_as_json(folder, capsys):
    assert main(["runs", "list", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["folder"], first["state"], first["tokens"], first["heldout_loss"]) == ("runs/a", "finished", 256, 3.5)
    assert second["heldout_loss"] is None  # NaN is no JSON


def test_compare(folder, capsys):
    assert main(["runs", "compare", "a", "runs/b", "--png", "x.png"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["loss", "0.00", "3.0000", "3.2500", "+0.2500"] in rows
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")


def test_compare_as_json(folder, capsys):
    assert main(["runs", "compare", "a", "b", "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["runs"] == ["runs/a", "runs/b"]
    loss = comparison["points"][0]
    assert loss == {"measure": "loss", "tokens": 256, "values": [3.0, 3.25], "differences": [0.0, 0.25]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "nowhere"], "there is no folder nowhere"),
        (["compare", "a", "c"], "c is no run"),
        (["compare", "a"], "two or more"),
        (["compare", "a", "runs/a"], "two or more, each once"),
        (["compare", "a", "b", "--png", "no/where.png"], "no/where.png cannot be written (No such file"),
    ],
)
def test_bad_input_is_one_sentence(folder, capsys, arguments, words):
    assert main(["runs", *arguments]) == 1
    message = capsys.readouterr().err
    assert words in message and message.startswith("soli: ") and message.count("\n") == 1
