"""`soli pull` and `soli models`, and the other verbs with the ID of what was pulled."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import soli
from soli.checkpoint import open_checkpoint
from soli.cli import main
from soli.cli.data import tokenizer_folder
from soli.hub.cache import display_name
from tests.hub.conftest import SHARDS, sharded_files
from tests.hub.stand_in import MAIN, Hub

ID = "org/nano"
NANO = open_checkpoint("nano").folder


def nano_files() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in NANO.iterdir() if file.is_file()}


def test_what_was_pulled_runs_by_its_id(hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hub.add(ID, nano_files())
    for command in (["generate", ID, "The river"], ["translate", "Hello", "--model", ID], ["serve", ID]):
        assert main(command) == 1
        assert f"download it with: soli pull {ID}\n" in capsys.readouterr().err
    assert not hub.calls
    assert main(["count", ID]) == 1
    assert f"soli pull {ID} --config-only" in capsys.readouterr().err
    assert main(["pull", ID, "--yes"]) == 0
    output = capsys.readouterr()
    folder = Path(output.out.strip())
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", *names]
    for words in (f"{ID} at main, commit {MAIN[:12]}", "6 files, ", " free for ", " available, weights 3"):
        assert words in output.err
    texts = []
    for name in (ID, f"{ID}@main", "nano"):
        assert main(["generate", name, "The river", "--max-new-tokens", "4"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert main(["count", ID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == soli.count("nano").total == soli.count(ID).total
    assert main(["translate", "Hello", "--model", ID]) == 0
    assert main(["convert", ID, str(tmp_path / "fp8"), "--to", "fp8"]) == 0
    assert (tmp_path / "fp8" / "tokenizer.json").read_bytes() == (NANO / "tokenizer.json").read_bytes()
    assert display_name(ID, folder) == ID and display_name(str(tmp_path / "fp8"), tmp_path / "fp8") == "fp8"
    assert tokenizer_folder(ID) == folder and tokenizer_folder(str(tmp_path)) == tmp_path
    llm = soli.LLM(ID)
    assert ID in repr(llm)
    llm.close()


def test_a_folder_of_that_name_comes_first(
    hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, sharded_files())
    assert main(["pull", ID, "--yes"]) == 0
    (tmp_path / "org" / "nano").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["generate", ID, "x"]) == 1
    assert "org/nano/config.json" in capsys.readouterr().err


def test_without_a_terminal_and_without_yes_nothing_is_downloaded(hub: Hub) -> None:
    hub.add(ID, sharded_files())
    command = [sys.executable, "-m", "soli", "pull", ID]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (result.returncode, result.stdout) == (2, "")
    assert "download 1.2 MB? there is no terminal to ask on: give --yes" in result.stderr
    assert not [call for call in hub.calls if "resolve" in call.path]


@pytest.mark.parametrize(("answer", "status"), [(b"n\n", 1), (b"\n", 1), (b"y\n", 0)])
def test_on_a_terminal_it_is_asked(hub: Hub, answer: bytes, status: int) -> None:
    hub.add(ID, sharded_files())
    controller, terminal = pty.openpty()
    os.write(controller, answer)
    command = [sys.executable, "-m", "soli", "pull", ID]
    result = subprocess.run(command, capture_output=True, text=True, stdin=terminal)
    os.close(controller)
    os.close(terminal)
    assert result.returncode == status and "download 1.2 MB? [y/N]" in result.stderr
    assert bool(result.stdout) == (status == 0)


def test_pull_as_json_and_what_is_there_already(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add(ID, sharded_files())
    assert main(["pull", ID, "--config-only", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["downloaded_bytes"] == report["bytes"] < 10_000 and report["commit"] == MAIN
    assert main(["pull", ID, "--yes", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 1_200_000 <= report["downloaded_bytes"] < report["bytes"]
    assert main(["pull", ID]) == 0  # nothing to do, so nothing to ask
    assert capsys.readouterr().err == ""


def test_models_are_listed_and_removed(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert f"no models in {cache}: soli pull ID downloads one" in capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    hub.add(ID, sharded_files())
    hub.add("org/part", sharded_files())
    assert main(["pull", ID, "--yes"]) == main(["pull", "org/part", "--config-only"]) == 0
    capsys.readouterr()
    assert main(["models", "--json"]) == 0
    whole, part = json.loads(capsys.readouterr().out)
    assert (whole["id"], whole["revision"], whole["complete"], whole["commit"]) == (ID, "main", True, MAIN)
    assert whole["bytes"] >= 1_200_000 and (part["id"], part["missing"]) == ("org/part", list(SHARDS))
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert "complete" in table and "incomplete: 2 files missing" in table and f"main ({MAIN[:12]})" in table
    assert main(["models", "rm", ID]) == 2
    assert "give --yes" in capsys.readouterr().err
    assert main(["models", "rm", ID, "--yes"]) == 0
    assert capsys.readouterr().out == f"removed {ID}, 1.2 MB\n" and not (cache / "models--org--nano").exists()
    assert main(["models", "rm", ID, "--yes"]) == 1
    assert "org/nano is not in" in capsys.readouterr().err
    assert main(["models", "rm", "../x", "--yes"]) == 1


def test_one_revision_of_two_is_removed(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = hub.add(ID, sharded_files())
    repository.files["c" * 40] = {**repository.files[MAIN], SHARDS[0]: b"other"}
    repository.refs["v1"] = "c" * 40
    assert main(["pull", ID, "--yes"]) == main(["pull", ID, "--revision", "v1", "--yes"]) == 0
    assert main(["models", "rm", f"{ID}@v1", "--yes"]) == 0
    capsys.readouterr()
    assert main(["models", "--json"]) == 0
    [remaining] = json.loads(capsys.readouterr().out)
    assert remaining["refs"] == ["main"] and remaining["complete"]
    assert main(["models", "rm", f"{ID}@v1", "--yes"]) == 1


def test_an_interrupted_download_is_removed_whole(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add(ID, sharded_files())
    hub.faults.damage.add(SHARDS[0])
    assert main(["pull", ID, "--yes"]) == 1
    (cache / "models--org--nano" / "blobs" / ("0" * 64 + ".incomplete")).write_bytes(b"x" * 1000)
    capsys.readouterr()
    assert main(["models"]) == 0
    assert " kB of it fetched" in capsys.readouterr().out
    assert main(["models", "rm", ID, "--yes"]) == 0
    assert not (cache / "models--org--nano").exists()


def test_importing_soli_and_counting_a_preset_do_not_load_the_library() -> None:
    script = (
        "import sys, soli, soli.cli; soli.count('nano'); soli.cli.main(['count', 'deepseek-v3']); "
        "assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
