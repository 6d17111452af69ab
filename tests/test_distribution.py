"""What is distributed: the workflow calls make targets that exist, the Dockerfile's steps work in a fresh folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def dockerfile_steps() -> list[tuple[str, str]]:
    """(instruction, rest of the line), comments left out."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line and not line.startswith("#")]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_workflow_and_dockerfile_call_make_targets_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    commands += [rest for instruction, rest in dockerfile_steps() if instruction == "RUN"]
    targets = [target for command in commands for target in re.findall(r"\bmake ([a-z-]+)", command)]
    assert {"test", "wheel", "wheel-test"} <= set(targets) <= make_targets()


@pytest.mark.slow
def test_the_steps_of_the_dockerfile_work_in_a_fresh_folder(tmp_path: Path) -> None:
    """Without a container engine: absolute paths are in a folder, apt-get and useradd do nothing."""
    system = tmp_path / "system"
    for name in ("apt-get", "useradd"):
        program = system / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    path = f"{system}:{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(tmp_path), "TORCH_INDEX": "", "SOLI_CACHE": str(tmp_path / "cache")}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    venv, workdir, entrypoint = tmp_path / "python", tmp_path, ""
    for instruction, rest in dockerfile_steps():
        rest = re.sub(r"(?<![\w.:/])/(checkout|wheels)", rf"{tmp_path}/\1", rest)
        if instruction == "COPY" and rest.startswith("."):
            subprocess.run(["git", "clone", "-q", ROOT, rest.split()[1]], check=True)
        elif instruction == "COPY":
            source, target = rest.split()[-2:]
            subprocess.run(["cp", "-r", source, target], check=True)
        elif instruction == "WORKDIR":
            workdir = Path(rest)
        elif instruction == "FROM":
            workdir = tmp_path
            if " AS " not in rest:  # the image that is shipped: a Python of its own, and no compiler
                subprocess.run(["sh", ROOT / "tools" / "venv.sh", venv], check=True, env=environment)
                environment |= {"PATH": f"{system}:{venv}/bin:/bin", "SOLI_CACHE": str(tmp_path / "unused")}
        elif instruction == "RUN":
            subprocess.run(["sh", "-c", rest], check=True, cwd=workdir, env=environment)
        elif instruction == "ENTRYPOINT":
            entrypoint = shlex.split(rest.strip("[]"))[0]
    command = [venv / "bin" / entrypoint, "translate", "He drank a cup of tea."]
    result = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.strip() and not (tmp_path / "unused").exists()
