"""Options that have no effect are rejected by name, errors name the command that helps, and --threads is everywhere."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from soli import machine
from soli.cli import main
from soli.plan import machine_report

FIXTURE = Path(__file__).parent.parent / "fixtures/v0_1"
COMPUTING = ("translate", "generate", "chat", "serve", "routing", "train", "eval", "bench serve", "convert", "export",
             "doctor")  # fmt: skip


@pytest.fixture
def threads():
    """Three threads, so that another number is seen; the number before is set again."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Planning options


@pytest.mark.parametrize(
    "options",
    [
        ["--devices", "8"], ["--devices", "1"], ["--mfu", "0.5"], ["--device-tflops", "100"], ["--no-measure"],
        ["--measure"], ["--plot", "plot.png"], ["--json"], ["--devices=2", "--mfu=0.3"],
    ],
)  # fmt: skip
def test_planning_options_without_a_dry_run_are_rejected_by_name(folder, options, capsys):
    assert main(["train", "nano-zh-en", *options]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert all(option.partition("=")[0] in message for option in options if option.startswith("--"))
    assert "only with --dry-run" in message and not list(folder.iterdir())


def test_planning_options_with_a_dry_run_are_read(capsys):
    assert main(["train", "671b", "--dry-run", "--no-measure", "--devices", "2048", "--mfu", "0.3"]) == 0
    assert "on 2,048 devices" in capsys.readouterr().out


# Missing data


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["nano-zh-en"], "soli data build nano-zh-en"),
        (["nano-zh-en", "--set", "data.seed=3", "--set", "run.seed=1"], "soli data build nano-zh-en --set=data.seed=3"),
        (["nano-zh-en", "--set", "data.folder=my data"], "soli data build nano-zh-en '--set=data.folder=my data'"),
        (["16b"], "soli data pack FILES... --tokenizer FOLDER --recipe 16b --out data/16b"),
    ],
)
def test_a_recipe_without_its_data_names_the_command_that_builds_it(folder, arguments, command, capsys):
    assert main(["train", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.endswith(f"build the recipe's data with: {command}\n") and message.count("\n") == 1
    assert "has no meta.json, tokenizer.json, train.bin, valid.bin:" in message
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train.bin", "valid.bin"])
def test_a_missing_data_file_is_named(folder, name, capsys):
    recipe = (FIXTURE / "recipe.toml").read_text().replace('folder = "data"', 'folder = "data"\ncorpus = "nano_corpus"')
    (folder / "recipe.toml").write_text(recipe)
    (folder / "data").mkdir()
    for file in (FIXTURE / "data").iterdir():
        if file.name != name:
            (folder / "data" / file.name).write_bytes(file.read_bytes())
    assert main(["train", "recipe.toml", "--out", "run"]) == 1
    assert f"data has no {name}: build the recipe's data with: soli data build recipe.toml" in capsys.readouterr().err
    assert not (folder / "run").exists()


# Threads


@pytest.mark.parametrize("verb", COMPUTING)
def test_every_verb_that_computes_has_threads(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    assert "--threads" in capsys.readouterr().out


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5", "1000000000"])
def test_an_impossible_number_of_threads_is_rejected(count, capsys, threads):
    assert main(["translate", "tea", "--threads", count]) == 2
    assert "--threads" in capsys.readouterr().err and torch.get_num_threads() == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["translate", "tea", "--max-new-tokens", "1"],
        ["generate", "nano", "The", "--max-new-tokens", "1"],
        ["routing", "text.txt"],
        ["eval", "nano", "--text", "text.txt"],
        ["convert", "nano", "out", "--to", "bf16"],
        ["export", "run", "out"],
        ["train", "16b", "--dry-run", "--no-measure"],
        ["doctor"],
    ],
)
def test_threads_take_effect(folder, threads, arguments, monkeypatch, capsys):
    monkeypatch.setattr(machine_report, "SECONDS", 0.01)
    (folder / "text.txt").write_text("He drank a cup of tea.\n")
    (folder / "run").symlink_to(FIXTURE / "run")
    assert main([*arguments, "--threads", "2"]) == 0
    assert torch.get_num_threads() == 2
    counts = []
    worker = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))  # the server computes in one
    worker.start()
    worker.join()
    assert counts == [2]


def test_no_threads_leave_the_number(threads, capsys):
    assert main(["translate", "tea", "--max-new-tokens", "1"]) == 0
    assert torch.get_num_threads() == 3


def test_threads_of_a_running_server_are_its_own(capsys):
    assert main(["bench", "serve", "http://127.0.0.1:9", "--threads", "2"]) == 2
    assert "--threads goes with a model folder" in " ".join(capsys.readouterr().err.split())


# A busy machine


@pytest.fixture
def busy_loops():
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


def test_doctor_reports_a_busy_machine(busy_loops, capsys, monkeypatch):
    monkeypatch.setattr(machine_report, "SECONDS", 0.01)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["busy_cores"] > 0.5
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "cores busy; this machine is busy: it measures and computes more slowly" in output


def test_the_load_of_others_leaves_out_this_process(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr(machine, "CPU_TIMES", stat)
    ticks = machine.os.sysconf("SC_CLK_TCK")
    clock = iter([0.0, 2.0])
    own = iter([(1.0, 0.0, 0.0, 0.0, 0.0), (2.0, 0.5, 0.0, 0.0, 0.0)])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(machine.os, "times", lambda: next(own))
    stat.write_text(f"cpu {10 * ticks} 0 0 500 500 0 0 0 0 0\ncpu0 1 1 1 1\n")
    after = f"cpu {11 * ticks} {ticks} {ticks} 900 900 0 {ticks} {ticks // 2} 0 0\n"
    monkeypatch.setattr(machine.time, "sleep", lambda _: stat.write_text(after))
    assert machine.busy_cores() == pytest.approx((4.5 - 1.5) / 2)


@pytest.mark.parametrize("text", ["", "cpu", "cpu 1 2 3", "cpu a b c d e f g h"])
def test_a_system_that_counts_otherwise_gives_no_load(tmp_path, monkeypatch, text):
    (tmp_path / "stat").write_text(text)
    monkeypatch.setattr(machine, "CPU_TIMES", tmp_path / "stat")
    assert machine.busy_cores(0) is None
