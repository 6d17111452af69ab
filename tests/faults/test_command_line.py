"""The command line tells what it does: speed, progress, completion, whole help, sentences from examples. Options that
have no effect are rejected by name, errors name the command that helps, and --threads is everywhere."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from soli import machine
from soli.checkpoint import load_model
from soli.cli import main
from soli.experts import memory_rate
from soli.kernels.cpu import build
from soli.serve import server
from tests.engine.tiny import tiny_folder

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests/fixtures/v0_1"
COMPUTING = ("translate", "generate", "chat", "serve", "routing", "train", "eval", "bench serve", "convert", "export",
             "doctor")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("toy"))


def test_generate_says_how_fast_it_was_on_standard_error(capsys):
    assert main(["generate", "nano", "The first", "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert "tokens/s" not in out
    assert re.search(
        r"^soli: [1-5] tokens, [\d,.]+ tokens/s; the first after \d+\.\d\d s, \d+ tokens of prompt$", err, re.M
    )


def test_help_of_verbs_of_a_verb_is_whole(capsys):
    assert main(["data", "--help"]) == 0
    assert "learn a tokenizer, pack tokens." in " ".join(capsys.readouterr().out.split())


def test_shells_complete_verbs_and_options(monkeypatch):
    script = [sys.executable, "-m", "soli"]
    for words, expected in (("soli tra", ["train", "translate"]), ("soli generate --temp", ["--temperature"])):
        environment = {
            **os.environ,
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
            "_SOLI_COMPLETE": "complete_bash",
        }
        result = subprocess.run(script, env=environment, capture_output=True, text=True)
        assert sorted(result.stdout.split()) == expected


def test_loading_tells_how_far_it_is(folder):
    calls = []
    load_model(folder, progress=lambda read, total: calls.append((read, total)))
    totals = {total for _, total in calls}
    assert len(totals) == 1 and [read for read, _ in calls] == sorted(read for read, _ in calls)
    assert calls[-1][0] == totals.pop()


def test_a_server_tells_how_far_loading_is(folder):
    """A line of its log every so often, in a process of its own whose weights take long."""
    code = (
        "import sys, time; from soli.cli import main; from soli.serve import server;"
        "from soli.checkpoint.reader import Checkpoint; read = Checkpoint.values; server.LOADING_SECONDS = 0.1;"
        "Checkpoint.values = lambda *arguments: time.sleep(0.05) or read(*arguments);"
        "sys.exit(main(['serve', sys.argv[1], '--port', '0', '--dtype', 'bfloat16']))"
    )
    server = subprocess.Popen([sys.executable, "-c", code, folder], stderr=subprocess.PIPE, text=True)
    lines = []
    for line in server.stderr:
        lines += [json.loads(line)] if line.startswith("{") else []
        if lines and lines[-1]["message"] == "ready":
            server.terminate()
    assert server.wait() == 0
    loading = [line for line in lines if line["message"] == "loading"]
    assert len(loading) > 2 and lines.index(loading[-1]) < [line["message"] for line in lines].index("ready")
    assert [line["bytes"] for line in loading] == sorted({line["bytes"] for line in loading})
    assert all(0 < line["percent"] <= 100 and line["bytes"] <= line["of"] for line in loading)


def test_a_model_that_loads_at_once_has_no_line(caplog):
    log = server.LoadingLog("nano")
    for read in range(10):
        log.update(read, 10)
    assert caplog.records == []


def test_an_example_without_a_server_ends_with_a_sentence():
    pytest.importorskip("openai")
    command = [sys.executable, ROOT / "examples" / "ask.py", "Hello", "http://127.0.0.1:9/v1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "is `soli serve` running at that address?" in result.stderr
    usage = subprocess.run(command[:2], capture_output=True, text=True)
    assert usage.returncode == 1 and usage.stderr.startswith("usage: ")


def test_compiling_the_kernels_is_announced_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(build, "find_compiler", lambda: "g++")
    monkeypatch.setattr(build, "_run", lambda command: "g++ 0\n")
    monkeypatch.setattr(build, "compile_library", lambda *_, **__: "broken")
    with pytest.raises(build.BuildError):
        build.build(cache=tmp_path)
    assert capfd.readouterr().err == "soli: compiling the C++ kernels for this machine, once; it takes about a minute\n"


@pytest.fixture
def threads():
    """Three threads, so that another number is seen; the number before is set again."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def current_folder(tmp_path, monkeypatch):
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
def test_planning_options_without_a_dry_run_are_rejected_by_name(current_folder, options, capsys):
    assert main(["train", "nano-zh-en", *options]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert all(option.partition("=")[0] in message for option in options if option.startswith("--"))
    assert "only with --dry-run" in message and not list(current_folder.iterdir())


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
def test_a_recipe_without_its_data_names_the_command_that_builds_it(current_folder, arguments, command, capsys):
    assert main(["train", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.endswith(f"build the recipe's data with: {command}\n") and message.count("\n") == 1
    assert "has no meta.json, tokenizer.json, train.bin, valid.bin:" in message
    assert not list(current_folder.iterdir())


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train.bin", "valid.bin"])
def test_a_missing_data_file_is_named(current_folder, name, capsys):
    recipe = (FIXTURE / "recipe.toml").read_text().replace('folder = "data"', 'folder = "data"\ncorpus = "nano_corpus"')
    (current_folder / "recipe.toml").write_text(recipe)
    (current_folder / "data").mkdir()
    for file in (FIXTURE / "data").iterdir():
        if file.name != name:
            (current_folder / "data" / file.name).write_bytes(file.read_bytes())
    assert main(["train", "recipe.toml", "--out", "run"]) == 1
    assert f"data has no {name}: build the recipe's data with: soli data build recipe.toml" in capsys.readouterr().err
    assert not (current_folder / "run").exists()


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
def test_threads_take_effect(current_folder, threads, arguments, monkeypatch, capsys):
    monkeypatch.setattr(memory_rate, "SECONDS", 0.01)
    (current_folder / "text.txt").write_text("He drank a cup of tea.\n")
    (current_folder / "run").symlink_to(FIXTURE / "run")
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


@pytest.mark.slow
def test_doctor_reports_a_busy_machine(busy_loops, capsys, monkeypatch):
    monkeypatch.setattr(memory_rate, "SECONDS", 0.01)
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
