"""The job files for two machines are valid bash, give torchrun flags that it has, and start one run of two agents."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import free_port
from tests.distributed.test_kill import recipe_file, saved_step
from tests.train.toy import write_data

EXAMPLES = Path(__file__).parents[2] / "examples"


def flags_of(script: str) -> set[str]:
    lines = (EXAMPLES / script).read_text(encoding="utf-8").splitlines()
    code = "\n".join(line for line in lines if not line.startswith("#"))
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code))


@pytest.mark.parametrize("script", ["two_machines.sh", "two_machines.sbatch"])
def test_job_files_are_valid_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", EXAMPLES / script], check=False).returncode == 0


def test_flags_are_torchruns() -> None:
    from torch.distributed.run import get_args_parser

    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    flags = flags_of("two_machines.sh")
    assert "--rdzv-endpoint" in flags and flags <= known
    assert flags_of("two_machines.sbatch") == {"--kill-on-bad-exit"}  # srun's


def test_a_missing_host_is_named() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HOST"}
    command = ["bash", EXAMPLES / "two_machines.sh", "train", "nano-zh-en"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "the machine whose port 29500 all others reach" in run.stderr


@pytest.mark.slow
def test_two_agents_that_the_job_file_starts_are_one_run(tmp_path: Path) -> None:
    data, run, steps = write_data(tmp_path / "data"), tmp_path / "run", 4
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    sizes = {"HOST": "127.0.0.1", "PORT": str(free_port()), "PROCESSES": "1", "RESTARTS": "0", "OMP_NUM_THREADS": "1"}
    command = ["bash", EXAMPLES / "two_machines.sh", "train", recipe_file(tmp_path, data, steps), "--out", run]
    environment = os.environ | sizes | {"PATH": path}
    agents = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert saved_step(run) == steps
