"""Decoding does not collapse while other processes use the processor (team.h, and OpenMP's spinning)."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

DECODE = """
import time{first}
import soli
import torch
torch.set_num_threads(2)
llm = soli.LLM("nano")
llm.generate(["warm up"], max_new_tokens=8)
start = time.perf_counter()
answer, = llm.generate(["In the beginning"], max_new_tokens=60)
print((time.perf_counter() - start) / len(answer.ids))
"""


@pytest.fixture
def busy_processor() -> Iterator[None]:
    """A busy loop for each of two processors."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


def seconds_per_token(torch_first: bool = False, **environment: str) -> float:
    """Of a process of its own. With `torch_first` OpenMP is loaded before soli can set how long it spins."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    script = DECODE.format(first=", torch" if torch_first else "")
    command = [sys.executable, "-c", script]
    return float(subprocess.run(command, env=inherited | environment, check=True, capture_output=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("torch_first", [False, True])
def test_a_busy_processor_costs_no_more_than_passive_waiting(busy_processor, torch_first):
    times = [(seconds_per_token(torch_first), seconds_per_token(OMP_WAIT_POLICY="passive")) for _ in range(3)]
    ours, passive = (min(column) for column in zip(*times, strict=True))
    assert ours < 3 * passive and ours < 0.05


def test_openmp_is_told_to_spin_briefly_unless_the_user_says_otherwise():
    script = "import os, soli; print(os.environ.get('GOMP_SPINCOUNT'))"
    inherited = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for environment, expected in (
        ({}, "2000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ):
        result = subprocess.run(
            [sys.executable, "-c", script], env=inherited | environment, capture_output=True, text=True
        )
        assert result.stdout.strip() == expected
