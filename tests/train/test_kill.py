"""A run killed with SIGKILL repeatedly, at random moments, ends as one that was never stopped.

Each session is forked from a server that has torch and soli imported, so that starting one is cheap.
"""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from soli.train.run_folder import checkpoints
from soli.train.settings import as_recipe, read_settings
from soli.train.setup import prepare
from soli.train.trainer import train
from tests.train.toy import settings, write_data

SERVER = multiprocessing.get_context("forkserver")
MANY = 10**6  # steps: no session reaches this end
RUN = {"save_every": 1, "device": "cpu"}


def recipe(steps: int) -> dict:
    """A toy whose schedule is the same at every step, however many there are."""
    evaluation = {"every": 5, "samples": 0}
    return as_recipe(settings(run=RUN, eval=evaluation, schedule={"constant_tokens": 128 * steps}), {})


def train_session(steps: int, data: Path, run: Path) -> None:
    """One session of a run, in a process of its own."""
    torch.set_num_threads(1)  # results are bit-identical only at one number of threads
    train(prepare(read_settings(recipe(steps)), {}, data, run))


def start(steps: int, data: Path, run: Path) -> multiprocessing.Process:
    process = SERVER.Process(target=train_session, args=(steps, data, run))
    process.start()
    return process


def finish(steps: int, data: Path, run: Path) -> None:
    process = start(steps, data, run)
    process.join()
    assert process.exitcode == 0


def saved_step(run: Path) -> int:
    """The step of the last complete checkpoint; 0 without one."""
    saved = checkpoints(run)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def kill(process: multiprocessing.Process, delay: float, run: Path, saving: bool) -> None:
    """Kill after `delay` seconds; `saving`: then during a save, after one that this session completed."""
    before = saved_step(run)
    time.sleep(delay)
    while saving and not (saved_step(run) > before and any((run / "checkpoints").glob(".step-*"))):
        time.sleep(0.0002)
        assert process.exitcode is None
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def recorded(run: Path) -> list[tuple[str, int, float]]:
    """(kind, step, loss) of every line of metrics.jsonl but those that record a session's beginning and the end."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines[:-1] if line["kind"] != "begin"]


def state(run: Path) -> dict[str, torch.Tensor]:
    last = checkpoints(run)[-1]
    return {**load_file(last / "model.safetensors"), **load_file(last / "optimizer.safetensors")}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_never_stopped(tmp_path, kills):
    SERVER.set_forkserver_preload(["soli.train.trainer", "tests.train.toy"])
    data, cut, whole = write_data(tmp_path / "data"), tmp_path / "cut", tmp_path / "whole"
    server_is_up = SERVER.Process()
    server_is_up.start()
    server_is_up.join()
    start_time = time.monotonic()
    process = start(MANY, data, cut)
    kill(process, 0, cut, saving=True)
    longest, draw = 1.5 * (time.monotonic() - start_time), random.Random(kills)
    reached = []
    for n in range(1, kills):
        kill(start(MANY, data, cut), draw.uniform(0, longest), cut, saving=n % 2 == 0)
        reached.append(saved_step(cut))
    assert reached == sorted(reached) and reached[-1] > 0  # no session lost what an earlier one had saved
    steps = reached[-1] + 3
    finish(steps, data, cut)
    finish(steps, data, whole)
    first, second = state(whole), state(cut)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert recorded(cut) == recorded(whole)
    assert [step for kind, step, _ in recorded(cut) if kind == "step"] == list(range(1, steps + 1))
    assert not list((cut / "checkpoints").glob(".*"))
