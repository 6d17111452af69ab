"""Training runs lose nothing: two processes on one folder, values that are not finite, mixed files, full disks,
signals, and folders that are not what they should be."""

import errno
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soli.checkpoint.shard import Shard
from soli.cli import main
from soli.errors import SoliError
from soli.train import checkpoints as checkpoints_module
from soli.train import run_folder, run_lock, trainer
from soli.train.checkpoint_saver import CheckpointSaver
from soli.train.checkpoints import load_run
from soli.train.report import MetricsFile
from soli.train.run_folder import RunProgress, best_checkpoint, checkpoints, read_progress, remove_checkpoint
from soli.train.run_lock import LOCK, RunIsLocked, is_locked, lock_run
from soli.train.runs import read_metrics, summarize
from soli.train.setup import prepare
from soli.train.trainer import take_step, train
from tests.train.toy import settings, write_data

FIXTURE = Path(__file__).parent.parent / "fixtures/v0_1"
ENDLESS = ("--set", "schedule.constant_tokens=1000000000", "--set", "eval.every=0")
SAVE_ALWAYS, SAVE_AT_THE_END = ("--set", "run.save_every=1"), ("--set", "run.save_every=0")
BIAS = "layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The recipe and data of version 0.1's fixture, without its run; the current folder."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*options: str, **keywords: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "soli", "train", "recipe.toml", "--out", "run", *ENDLESS, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords)


def wait_for_step(process: subprocess.Popen) -> None:
    for line in process.stderr:
        if line.startswith("step "):
            return
    raise AssertionError("the run ended before its first step")


def wait_for_checkpoint(run: Path, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 60
    while not checkpoints(run):
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stop(process: subprocess.Popen, number: int = signal.SIGTERM) -> str:
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but its lock, which names the latest holder."""
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != LOCK}


def last_recorded_step(run: Path) -> int:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1]


# Two processes


def test_a_second_run_in_one_folder_is_rejected_and_names_the_first(folder, capsys, monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.1)
    (folder / "link").symlink_to("run")
    first = start(*SAVE_ALWAYS)
    try:
        wait_for_checkpoint(folder / "run", first)
        for out in ("run", "link", str(folder / "run")):
            assert main(["train", "recipe.toml", "--out", out]) == 1
            message = capsys.readouterr().err
            assert message.count("\n") == 1
            assert f"{out} is being trained by process {first.pid} on {os.uname().nodename} since 20" in message
        assert main(["export", "run", "model", "--format", "fp32"]) == 0  # readers are not blocked
        assert summarize(read_metrics(folder / "run")).state == "running"
        assert first.poll() is None
    finally:
        message = stop(first)
    assert first.returncode == 0, message
    assert read_progress(checkpoints(folder / "run")[-1]).step == last_recorded_step(folder / "run")


def test_a_checkpoint_that_the_run_removes_while_it_is_exported_is_given_up_for_a_later_one(folder, monkeypatch):
    assert main(["train", "recipe.toml", "--out", "run", "--set", "run.save_every=1", "--set", "run.keep=2"]) == 0
    first, last = checkpoints(folder / "run")[-2:]
    listed = iter([[first, last], [last], [last]])
    monkeypatch.setattr(run_folder, "best_checkpoint", lambda run: next(listed)[0])
    read = checkpoints_module.load_config

    def load_config(checkpoint):
        if checkpoint == first:
            remove_checkpoint(first)
        return read(checkpoint)

    monkeypatch.setattr(checkpoints_module, "load_config", load_config)
    assert main(["export", "run", "model", "--format", "fp32"]) == 0
    assert (folder / "model" / "config.json").is_file() and not first.exists()


def test_a_checkpoint_that_goes_after_it_was_listed_is_no_error(folder, monkeypatch):
    assert main(["train", "recipe.toml", "--out", "run", "--set", "run.save_every=1", "--set", "run.keep=2"]) == 0
    saved = checkpoints(folder / "run")
    gone = saved[0].with_name("step-00000000")
    monkeypatch.setattr(run_folder, "checkpoints", lambda run: [gone, *saved])
    assert best_checkpoint(folder / "run") in saved
    gone.mkdir()  # there, and without its state: damaged
    with pytest.raises(SoliError, match="step-00000000"):
        best_checkpoint(folder / "run")


def test_a_killed_run_leaves_no_lock(folder, capsys):
    first = start(*SAVE_ALWAYS)
    wait_for_checkpoint(folder / "run", first)
    stop(first, signal.SIGKILL)
    assert is_locked(folder / "run") is False
    assert summarize(read_metrics(folder / "run")).state == "stopped"  # at once, whatever the clock says
    step = read_progress(checkpoints(folder / "run")[-1]).step
    assert main(["train", "recipe.toml", "--out", "run", *ENDLESS, "--set", "run.max_minutes=1e-9"]) == 0
    assert f"resuming after step {step}," in capsys.readouterr().err


def test_a_lock_that_was_removed_and_taken_by_another_process_ends_the_run_at_its_next_save(tmp_path, data):
    run = prepare(settings(), {}, data, tmp_path)
    (tmp_path / LOCK).unlink()
    draft = tmp_path / "checkpoints/.step-00000000/of another process"
    draft.mkdir(parents=True)
    script = "import sys; from pathlib import Path; from soli.train.run_lock import lock_run; "
    script += "lock = lock_run(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with (
            pytest.raises(SoliError, match=f"is being trained by process {other.pid}"),
            CheckpointSaver(tmp_path, 1) as saver,
        ):
            saver.save(run.model, run.optimizer, run.progress)
        other.stdin.close()
    assert draft.is_dir() and checkpoints(tmp_path) == []


def test_a_holder_whose_record_is_damaged_is_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0)
    lock = lock_run(tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: lock.pid + 1)  # as another process sees it
    for text in ("", "[", '{"pid": 1}', "[" * 4000, '{"pid": "\\u001b[2J", "host": "h", "started": "s"}'):
        (tmp_path / LOCK).write_text(text)
        with pytest.raises(RunIsLocked, match=r"by (another process|process \[2J on h since s):"):
            lock_run(tmp_path)


def test_a_file_system_without_locks_trains_and_says_so(tmp_path, data, monkeypatch, capsys):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    assert train(prepare(settings(), {}, data, tmp_path)) == "finished"
    assert "is on a file system without locks" in capsys.readouterr().err
    assert is_locked(tmp_path) is None


# Values that are not finite


def poison(run, kind: str) -> str:
    """Damage one tensor of the state; its full name."""
    if kind == "bias":
        run.model.state_dict()[BIAS][1] = float("inf")
        return f"model/{BIAS}"
    p = run.model.lm_head.weight
    if kind == "weight":
        with torch.no_grad():
            p[3, 5] = float("nan")
        return "model/lm_head.weight"
    part = next(part for part in run.optimizer.parts if p in part.state)
    part.state[p]["exp_avg_sq"][3, 5] = float(kind)
    return "optimizer/lm_head.weight|exp_avg_sq"


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "weight", "bias"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, data, monkeypatch, kind, moments):
    run = prepare(settings(optimizer={"moments": moments}), {}, data, tmp_path)
    names = []

    def step_then_damage(run):
        result = take_step(run)
        if run.progress.step == 8:
            names.append(poison(run, kind))
        return result

    monkeypatch.setattr(trainer, "take_step", step_then_damage)
    monkeypatch.setattr(trainer, "measure", lambda *_: None)
    with pytest.raises(SoliError) as error:
        train(run)
    sentence = str(error.value)
    assert f"{names[0]} holds values that are not finite, so " in sentence
    assert f"the last finite checkpoint is {tmp_path}/checkpoints/step-00000004: to resume from it run soli" in sentence
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    assert train(prepare(settings(), {}, data, tmp_path)) == "finished"


def test_a_saved_state_that_is_not_finite_is_not_resumed(tmp_path, data):
    train(prepare(settings(), {}, data, tmp_path))
    last, before = checkpoints(tmp_path)[-1], checkpoints(tmp_path)[-2]
    for file, name in (("optimizer", "lm_head.weight|exp_avg"), ("model", "norm.weight")):
        damaged = last / f"{file}.safetensors"
        sound = damaged.read_bytes()
        tensors = load_file(damaged)
        tensors[name].view(-1)[0] = float("nan")
        save_file(tensors, damaged, Shard(damaged).metadata)
        with pytest.raises(SoliError) as error:
            prepare(settings(), {}, data, tmp_path)
        assert f"{file}/{name} holds values that are not finite; the last finite checkpoint is {before}" in str(
            error.value
        )
        assert f"remove {last}, then run soli train again with a lower" in str(error.value)
        if file == "optimizer":
            damaged.write_bytes(sound)
    shutil.rmtree(last)
    assert prepare(settings(), {}, data, tmp_path).progress.step == 8


def test_an_anomaly_names_the_checkpoint_to_resume(tmp_path, data, monkeypatch):
    def damaged_step(run):
        if run.progress.step == 9:
            poison(run, "weight")
        return take_step(run)

    monkeypatch.setattr(trainer, "take_step", damaged_step)
    with pytest.raises(SoliError, match=r"at step 10;.*the last finite checkpoint is \S*step-00000008: to resume"):
        train(prepare(settings(), {}, data, tmp_path))


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(tmp_path, data, monkeypatch):
    real, losses = trainer.evaluate, iter([3.0, float("nan"), 4.0])
    monkeypatch.setattr(trainer, "evaluate", lambda *args: type(real(*args))(next(losses), 1.0, 0.5))
    train(prepare(settings(run={"keep": 3}), {}, data, tmp_path))
    assert best_checkpoint(tmp_path).name == "step-00000004"
    state = checkpoints(tmp_path)[1] / "state.json"
    assert json.loads(state.read_text())["valid_loss"] is None
    state.write_text(state.read_text().replace('"valid_loss": null', '"valid_loss": NaN'))  # as version 0.2 wrote it
    assert best_checkpoint(tmp_path).name == "step-00000004"


# Files of two checkpoints


@pytest.fixture(scope="module")
def two_runs(data, tmp_path_factory):
    """Two runs that differ in their seed alone."""
    parent = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        train(prepare(settings(run={"seed": seed, "keep": 3}), {}, data, parent / name))
    return parent


@pytest.mark.parametrize(
    ("source", "file", "message"),
    [
        ("a/checkpoints/step-00000008", "state.json", r"state\.json (does not belong to model|is the state of step 8)"),
        ("b/checkpoints/step-00000012", "state.json", r"state\.json does not belong to model\.safetensors beside it"),
        ("b/checkpoints/step-00000012", "model.safetensors", r"state\.json does not belong to model\.safetensors"),
        ("a/checkpoints/step-00000008", "optimizer.safetensors", r"state\.json does not belong to optimizer"),
    ],
)
def test_files_of_another_checkpoint_are_rejected(tmp_path, data, two_runs, source, file, message):
    shutil.copytree(two_runs / "a", tmp_path / "a")
    last = checkpoints(tmp_path / "a")[-1]
    shutil.copyfile(two_runs / source / file, last / file)
    with pytest.raises(SoliError, match=message):
        prepare(settings(run={"seed": 0}), {}, data, tmp_path / "a")
    for other in checkpoints(tmp_path / "a")[:-1]:
        shutil.rmtree(other)
    if file != "optimizer.safetensors":
        with pytest.raises(SoliError, match=message):
            load_run(tmp_path / "a")


def test_a_state_without_an_id_beside_tensors_with_one_is_rejected_and_vice_versa(tmp_path, data, two_runs):
    shutil.copytree(two_runs / "a", tmp_path / "a")
    last = checkpoints(tmp_path / "a")[-1]
    state = json.loads((last / "state.json").read_text())
    del state["checkpoint_id"]
    (last / "state.json").write_text(json.dumps(state))
    with pytest.raises(SoliError, match="does not belong to model"):
        load_run(tmp_path / "a")
    for file in last.glob("*.safetensors"):
        save_file(load_file(file), file)
    assert prepare(settings(run={"seed": 0}), {}, data, tmp_path / "a").progress.step == 12  # as version 0.2 saved it
    (last / "state.json").write_text(json.dumps(state | {"step": 8}))
    with pytest.raises(SoliError, match=r"state\.json is the state of step 8, not of step-00000012; remove"):
        prepare(settings(run={"seed": 0}), {}, data, tmp_path / "a")
    state["checkpoint_id"] = "0" * 32
    (last / "state.json").write_text(json.dumps(state))
    with pytest.raises(SoliError, match="does not belong to model"):
        load_run(tmp_path / "a")


@pytest.mark.parametrize("field", ["tokens", "position", "seconds", "losses", "skipped", "stage_start", "valid_loss"])
def test_a_state_that_was_changed_is_rejected_and_one_that_was_reformatted_is_not(tmp_path, data, two_runs, field):
    shutil.copytree(two_runs / "a", tmp_path / "a")
    file = checkpoints(tmp_path / "a")[-1] / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(state.items()))))
    assert prepare(settings(run={"seed": 0}), {}, data, tmp_path / "a").progress.step == 12
    file.write_text(json.dumps(state | {field: [1.0] if field == "losses" else 128}))
    with pytest.raises(SoliError, match="does not belong to model"):
        prepare(settings(run={"seed": 0}), {}, data, tmp_path / "a")


def test_a_configuration_that_was_changed_is_rejected(tmp_path, data, two_runs):
    shutil.copytree(two_runs / "a", tmp_path / "a")
    config = best_checkpoint(tmp_path / "a") / "config.json"
    config.write_text(config.read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1'))
    with pytest.raises(SoliError, match=r"config\.json is not the one that was saved with this checkpoint"):
        load_run(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", '"x"', "[" * 100_000, '{"step": "12"}', '{"step": -1}', '{"step": 12.5}', '{"step": null}',
        '{"step": 12, "losses": 3}', '{"step": 12, "losses": ["x"]}', '{"step": 12, "norms": [NaN]}',
        '{"step": 12, "seconds": 1e999}', '{"step": 12, "valid_loss": "x"}', '{"step": 12, "unknown": 1}',
        '{"step": {"x": [1]}}', '{"step": true}',
    ],
)  # fmt: skip
def test_a_state_with_wrong_types_is_rejected_in_one_sentence(tmp_path, text):
    checkpoint = tmp_path / "checkpoints/step-00000012"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(text)
    with pytest.raises(SoliError, match=r"state\.json: .*; remove this checkpoint"):
        read_progress(checkpoint)


@pytest.mark.parametrize(
    "line",
    [
        "", "3", "[]", "{}", "[" * 100_000, '{"kind": ["step"]}', '{"kind": "end"}', '{"kind": "step", "step": 1}',
        '{"kind": "end", "step": "1", "tokens": 1, "seconds": 1}', '{"kind": "x", "step": ' + "9" * 5000 + "}",
        '{"kind": "evaluation", "step": 1, "tokens": 1, "seconds": 1, "loss": 1, "bits_per_byte": 1, "stage": "x"}',
    ],
)  # fmt: skip
def test_a_metrics_line_of_another_kind_is_rejected_by_number(tmp_path, line, capsys):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert main(["runs", "list", str(tmp_path)]) == 1
    assert "metrics.jsonl, line 1 is not what soli train writes" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"model": 3}', '{"schedule": null}', '{"a": 1, "a": 1}', "[" * 100_000])
def test_a_damaged_resolved_recipe_is_rejected_in_one_sentence(tmp_path, data, two_runs, text):
    shutil.copytree(two_runs / "a", tmp_path / "a")
    (tmp_path / "a/recipe.resolved.json").write_text(text)
    with pytest.raises(SoliError, match=r"recipe\.resolved\.json: "):
        prepare(settings(run={"seed": 0}), {}, data, tmp_path / "a")


def test_only_folders_named_by_a_step_are_checkpoints(tmp_path):
    for name in ("step-00000004", "step-00000012", "step-100000000", "step-00000012.bak", "step-00000012 (copy)"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000099").write_text("a file")
    (tmp_path / "checkpoints/step-٠٠٠٠٠٠٩٩").mkdir()
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-00000004", "step-00000012", "step-100000000"]


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB; skipped where none may be mounted."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "soli-test", mounted], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as stream:
        for block in (65536, 4096, 1):
            try:
                while True:
                    stream.write(bytes(block))
            except OSError:
                continue


def assert_ends_unharmed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A session that can write nothing ends in one sentence and leaves every file as it was."""
    before = contents(run)
    capsys.readouterr()
    assert main(["train", "recipe.toml", "--out", str(run), "--set", "schedule.constant_tokens=4096"]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("soli: ")]
    assert "unexpected" not in line and ("No space left on device" in line or "File too large" in line)
    assert contents(run) == before


@pytest.mark.parametrize("torn", [False, True])
def test_a_full_disk_truncates_nothing(folder, small_disk, torn, capsys):
    run = small_disk / "run"
    assert main(["train", "recipe.toml", "--out", str(run)]) == 0
    if torn:
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write('{"kind": "step", "st')
    fill(small_disk)
    assert_ends_unharmed(run, capsys)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()  # a start, which writes the recipe again
    fill(small_disk)
    assert_ends_unharmed(run, capsys)


@pytest.mark.parametrize("limit", [0, 10, 300, 2000])
def test_a_limit_on_file_sizes_truncates_nothing(folder, limit, capsys):
    assert main(["train", "recipe.toml", "--out", "run"]) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert_ends_unharmed(folder / "run", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_metrics_that_cannot_be_written_leave_whole_lines(tmp_path, small_disk):
    metrics = MetricsFile(small_disk, 0)
    metrics.write({"kind": "step", "step": 1})
    fill(small_disk)
    with pytest.raises(SoliError, match=r"metrics\.jsonl could not be written \(No space left on device\)"):
        for step in range(2, 10_000):
            metrics.write({"kind": "step", "step": step, "text": "x" * 1000})
    metrics.close()
    lines = (small_disk / "metrics.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b"" and all(json.loads(line) for line in lines)


# Signals


def hear_hangups() -> None:
    """In a child process: as in a terminal, also where these tests run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_hangup_saves_the_state(folder):
    process = start(*SAVE_AT_THE_END, preexec_fn=hear_hangups)
    wait_for_step(process)
    message = stop(process, signal.SIGHUP)
    assert process.returncode == 0 and "state is in run" in message
    assert read_progress(checkpoints(folder / "run")[-1]).step == last_recorded_step(folder / "run")


@pytest.mark.slow
def test_nohup_is_respected(folder):
    process = start(*SAVE_AT_THE_END, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_step(process)
    process.send_signal(signal.SIGHUP)
    for _ in range(5):
        wait_for_step(process)
    stop(process)
    assert process.returncode == 0


@pytest.mark.slow
def test_a_closed_terminal_saves_the_state(folder):
    """The terminal is gone when the run hears of it: what it prints then fails."""
    pid, terminal = pty.fork()
    if pid == 0:
        hear_hangups()
        command = [sys.executable, "-m", "soli", "train", "recipe.toml", "--out", "run", *ENDLESS, *SAVE_AT_THE_END]
        os.execv(sys.executable, command)
    text = b""
    while b"tokens" not in text:
        text += os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read_progress(checkpoints(folder / "run")[-1]).step == last_recorded_step(folder / "run")


# Folders


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "run is not a folder"),
        ("link", "run is a link to nowhere, which does not exist"),
        ("loop", r"run cannot be created \(Too many levels of symbolic links\)|run is a link to run"),
        ("checkpoints", "run/checkpoints is not a folder"),
        ("lock", r"run/run\.lock cannot be opened \(Is a directory\)"),
        ("lock link", r"run/run\.lock cannot be opened \(Too many levels of symbolic links\)"),
        ("metrics", r"run/metrics\.jsonl is not a file"),
        ("pipe", r"run/metrics\.jsonl is not a file"),
        ("recipe", r"run/recipe\.resolved\.json cannot be written \(Is a directory\)"),
        ("parent", r"run/deeper cannot be created \(Not a directory\)"),
    ],
)
def test_what_is_no_run_folder_is_rejected_in_one_sentence(tmp_path, data, place, message, capsys):
    run = tmp_path / "run"
    out = run
    if place in ("file", "parent"):
        run.write_text("mine")
        out = run / "deeper" if place == "parent" else run
    elif place in ("link", "loop"):
        run.symlink_to("nowhere" if place == "link" else "run")
    else:
        run.mkdir()
        name = {"checkpoints": "checkpoints", "lock": LOCK, "lock link": LOCK, "recipe": "recipe.resolved.json"}
        target = run / name.get(place, "metrics.jsonl")
        if place == "lock link":
            target.symlink_to(tmp_path / "elsewhere")
        elif place == "pipe":
            os.mkfifo(target)
        elif place == "checkpoints":
            target.write_text("mine")
        else:
            target.mkdir()
    with pytest.raises(SoliError, match=message):
        train(prepare(settings(), {}, data, out))
    assert not (tmp_path / "elsewhere").exists()
    if place in ("file", "parent"):
        assert run.read_text() == "mine"


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", ["step-00000012", ".step-00000012", ".step-00000012.old"])
@pytest.mark.parametrize("make", [_fifo, Path.touch, _loop])
def test_what_is_in_the_place_of_a_checkpoint_is_replaced(folder, name, make, capsys):
    """A FIFO as well: what removes folders opens one, and waits."""
    assert main(["train", "recipe.toml", "--out", "run"]) == 0
    [saved] = (folder / "run" / "checkpoints").glob("step-*12")
    shutil.rmtree(saved)
    make(saved.with_name(name))
    assert main(["train", "recipe.toml", "--out", "run"]) == 0
    assert read_progress(saved).step == 12
    assert not list(saved.parent.glob(".*"))


def test_a_read_only_folder_is_rejected_in_one_sentence(tmp_path, data, small_disk):
    train(prepare(settings(), {}, data, small_disk))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SoliError, match=r"run\.lock cannot be opened \(Read-only file system\); check its"):
        prepare(settings(), {}, data, small_disk)
    load_run(small_disk)


@pytest.mark.parametrize("removed", ["checkpoints", "."])
def test_a_folder_removed_while_its_run_trains_is_created_again(tmp_path, data, monkeypatch, removed):
    run_folder = tmp_path / "run"
    run = prepare(settings(), {}, data, run_folder)

    def step_then_remove(run):
        result = take_step(run)
        if run.progress.step == 6:
            while not checkpoints(run_folder):
                time.sleep(0.01)
            shutil.rmtree(run_folder / removed)
        return result

    monkeypatch.setattr(trainer, "take_step", step_then_remove)
    assert train(run) == "finished"
    monkeypatch.undo()
    assert [path.name for path in checkpoints(run_folder)] == ["step-00000008", "step-00000012"]
    longer = settings(schedule={"constant_tokens": 128 * 16})
    assert train(prepare(longer, {}, data, run_folder)) == "finished"
    assert read_progress(checkpoints(run_folder)[-1]).step == 16


def test_a_clock_set_back_does_not_make_a_stopped_run_run(tmp_path):
    line = {"kind": "evaluation", "step": 1, "tokens": 1, "seconds": 1.0, "loss": 1.0, "bits_per_byte": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert summarize(read_metrics(tmp_path), now=time.time() - 10_000).state == "stopped"


def test_progress_of_every_version_is_read():
    old = checkpoints(FIXTURE / "run")[-1]
    assert read_progress(old) == RunProgress(**json.loads((old / "state.json").read_text()))
