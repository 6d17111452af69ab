"""The command line tells what it does: speed, progress, completion, whole help, sentences from examples."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from soli.checkpoint import load_model
from soli.cli import main
from soli.kernels.cpu import build
from tests.engine.tiny import tiny_folder

ROOT = Path(__file__).parents[2]


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
