"""A file that becomes shorter while it is mapped or read is named in one sentence."""

import os
import shutil
import subprocess
import sys

import pytest

from soli.checkpoint import Checkpoint, load
from soli.checkpoint.convert import convert_checkpoint
from soli.checkpoint.writer import Target
from soli.errors import SoliError
from tests.checkpoint.folders import saved

GENERATE = """
import os, sys
import torch
torch.set_num_threads(2)
import soli
llm = soli.LLM(sys.argv[1], dtype="as-is", runner=sys.argv[2])
llm.generate("Good morning", max_new_tokens=2)
os.truncate(sys.argv[1] + "/model.safetensors", 70_000)
print("cut", flush=True)
llm.generate("Good morning", max_new_tokens=200)
"""


@pytest.mark.parametrize(("kernels", "runner"), [(None, "auto"), (None, "eager"), ("torch", "eager")])
def test_weights_that_shrink_while_a_model_generates(kernels, runner, tmp_path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(load.BUNDLED / "nano", folder)
    environment = os.environ | ({"SOLI_KERNELS": kernels} if kernels else {})
    command = [sys.executable, "-c", GENERATE, str(folder), runner]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (result.returncode, result.stdout) == (1, "cut\n"), result
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f"soli: {folder / 'model.safetensors'} became shorter while it was in use")


ANOTHER = """
import mmap, os, sys
from soli.mapped_files import name_files_that_shrink
name_files_that_shrink()
{code}
"""


def ended(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ANOTHER.format(code=code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_signal_from_elsewhere_ends_the_process_as_before() -> None:
    assert ended("os.kill(os.getpid(), 7)").returncode == -7


def test_the_thread_that_reads_may_be_any(tmp_path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(2**16))
    code = """
import threading
stream = open(sys.argv[1], "rb")
mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate(sys.argv[1], 10)
thread = threading.Thread(target=lambda: mapped[2**15])
thread.start()
thread.join()
"""
    result = ended(code, str(file))
    assert result.returncode == 1 and str(file) in result.stderr and result.stderr.count("\n") == 1, result


def test_tokens_that_shrink_while_a_run_trains_on_them(tmp_path) -> None:
    file = tmp_path / "train.bin"
    file.write_bytes(bytes(2**20))
    code = """
from pathlib import Path
import numpy as np
from soli.data.token_files import map_tokens
tokens = map_tokens(Path(sys.argv[1]), np.dtype(np.uint16))
os.truncate(sys.argv[1], 10)
tokens[np.array([[2**18, 2**18 + 1]])]
"""
    result = ended(code, str(file))
    assert result.returncode == 1 and result.stderr.startswith(f"soli: {file} became shorter"), result


def test_a_file_that_shrinks_while_it_is_converted_leaves_nothing_behind(tmp_path) -> None:
    folder = saved(tmp_path / "m")
    shard = folder / "model.safetensors"

    def cut(written: int, total: int) -> None:
        os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(SoliError, match=r"model.safetensors: tensor .* became shorter while it was read"):
        convert_checkpoint(folder, tmp_path / "converted", Target("fp8"), cut)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_file_that_shrank_before_it_is_mapped(tmp_path) -> None:
    folder = saved(tmp_path / "m")
    checkpoint = Checkpoint(folder)
    os.truncate(folder / "model.safetensors", 0)
    slot = checkpoint.slots[0]
    for access in (lambda: checkpoint.stored(slot.name), lambda: checkpoint.parameter(slot, checkpoint.natural_dtype)):
        with pytest.raises(SoliError, match=r"model.safetensors: cannot be mapped into memory"):
            access()
