"""Ranks killed at random moments, one or all, and resumed: the run ends as one that was never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from soli.parallel.ranks import joined
from soli.train.checkpoints import load_run
from soli.train.run_folder import checkpoints
from soli.train.setup import prepare
from soli.train.trainer import train
from tests.distributed.ranks import run_ranks, start_ranks
from tests.distributed.runs import VECTORS, saved_state
from tests.train.toy import RECIPE, settings

WITHIN = 60.0  # seconds in which the other ranks end
AS_ONE_PROCESS = {"model": RECIPE["model"] | VECTORS, "optimizer": {"clip": 1e9}}  # to the last bit
MANY = 10**6  # steps: no session reaches this end


def train_session(data: Path, folder: Path, steps: int) -> None:
    sections = {
        "run": {"save_every": 1},
        "eval": {"every": 5, "samples": 0},
        "schedule": {"constant_tokens": 128 * steps},
        "parallel": {"data": 1, "expert": 2},
    }
    run = prepare(settings(**sections), {}, data, folder)
    with joined(run.ranks):
        train(run)


def saved_step(run: Path) -> int:
    saved = checkpoints(run)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_ranks_killed_at_random_moments_end_as_never_stopped(tmp_path, data, kills):
    cut, whole, draw = tmp_path / "cut", tmp_path / "whole", random.Random(kills)
    for number in range(kills):
        before = saved_step(cut)
        processes = start_ranks(train_session, 2, tmp_path / "ranks", data, cut, MANY)
        while saved_step(cut) == before:
            time.sleep(0.01)
            assert all(process.exitcode is None for process in processes)
        time.sleep(draw.uniform(0, 0.5))
        killed = processes if number % 2 else processes[draw.randrange(2) :][:1]
        for process in killed:
            process.kill()
        deadline = time.monotonic() + WITHIN
        for process in processes:
            process.join(deadline - time.monotonic())
            assert process.exitcode not in (None, 0)
    steps = saved_step(cut) + 2
    for folder in (cut, whole):
        run_ranks(train_session, 2, tmp_path / "ranks", data, folder, steps)
    first, second = saved_state(cut), saved_state(whole)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert not list((cut / "checkpoints").glob(".*"))


def recipe_file(folder: Path, data: Path, steps: int) -> Path:
    recipe = {**RECIPE, **AS_ONE_PROCESS, "parallel": {"data": 2}}
    recipe["schedule"] = RECIPE["schedule"] | {"constant_tokens": 128 * steps}
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in recipe.items()
    ]
    file = folder / "toy.toml"
    file.write_text(f"[data]\nfolder = {json.dumps(str(data))}\n" + "\n".join(lines))
    return file


def start(*arguments: str | Path) -> subprocess.Popen:
    """In a process group of its own, as a shell starts it."""
    command, env = [sys.executable, *map(str, arguments)], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=env, text=True, process_group=0)


def ranks_of(agent: subprocess.Popen) -> dict[int, int]:
    """Process numbers of the ranks that an agent has started."""
    ranks = {}
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                ranks[int(entry[5:])] = int(child)
    return ranks


def wait_for_checkpoint(agent: subprocess.Popen, run: Path) -> None:
    while not checkpoints(run):
        time.sleep(0.1)
        assert agent.poll() is None, agent.stderr.read()


@pytest.mark.slow
def test_soli_train_starts_ranks_and_names_the_one_that_was_killed(tmp_path, data):
    run = tmp_path / "run"
    command = ["-m", "soli", "train", recipe_file(tmp_path, data, MANY), "--processes", "2", "--out", run]
    agent = start(*command)
    wait_for_checkpoint(agent, run)
    victim = ranks_of(agent)[1]
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    _, error = agent.communicate(timeout=WITHIN)
    assert time.monotonic() - killed < WITHIN and agent.returncode == 1
    assert f"soli: rank 1 (process {victim}) was ended by SIGKILL" in error and "Traceback" not in error
    steps = saved_step(run) + 4
    agent = start(*command, "--set", f"schedule.constant_tokens={128 * steps}")
    _, error = agent.communicate(timeout=120)
    assert agent.returncode == 0 and saved_step(run) == steps, error
    assert error.count("resuming after step") == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, steps + 1))
    one = settings(**AS_ONE_PROCESS, schedule={"constant_tokens": 128 * steps})
    train(prepare(one, {}, data, tmp_path / "one"))
    first, second = load_run(run).state_dict(), load_run(tmp_path / "one").state_dict()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("to", ["agent", "rank", "terminal"])
def test_a_signal_saves_and_stops_all_ranks(tmp_path, data, to):
    run = tmp_path / "run"
    agent = start("-m", "soli", "train", recipe_file(tmp_path, data, MANY), "--processes", "2", "--out", run)
    wait_for_checkpoint(agent, run)
    before = saved_step(run)
    if to == "terminal":
        os.killpg(agent.pid, signal.SIGINT)  # Ctrl-C
    else:
        os.kill(agent.pid if to == "agent" else ranks_of(agent)[1], signal.SIGTERM)
    _, error = agent.communicate(timeout=WITHIN)
    assert agent.returncode == 0 and saved_step(run) > before, error
    assert f"stopped after step {saved_step(run)}" in error and "Traceback" not in error


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(tmp_path, data):
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--standalone"]
    steps = 100
    agent = start(*torchrun, "-m", "soli", "train", recipe_file(tmp_path, data, steps), "--out", run)
    wait_for_checkpoint(agent, run)
    os.kill(ranks_of(agent)[0], signal.SIGKILL)
    _, error = agent.communicate(timeout=300)
    assert agent.returncode == 0 and saved_step(run) == steps, error
    assert "resuming after step" in error


@pytest.mark.slow
def test_two_agents_with_a_rendezvous_are_one_run(tmp_path, data):
    """As on two machines that share the run's folder."""
    from tests.distributed.ranks import free_port

    run, steps = tmp_path / "run", 12
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "toy"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous]
    command = [*torchrun, "-m", "soli", "train", recipe_file(tmp_path, data, steps), "--out", run]
    agents = [start(*command), start(*command)]
    errors = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    train(prepare(settings(**AS_ONE_PROCESS), {}, data, tmp_path / "one"))
    first, second = load_run(run).state_dict(), load_run(tmp_path / "one").state_dict()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
