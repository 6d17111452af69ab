"""Processes as torchrun would start them, gloo on the loopback; each runs one function and returns a value.

They are forked from a server that has torch and soli imported, so that starting one takes a fraction of a second.
"""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = [
    *("soli.train.trainer", "soli.parallel.sharding", "soli.parallel.mesh", "tests.train.toy"),
    "tests.distributed.shared_models",
]
CLOSE_SECONDS = 5  # that a rank with a result waits for the others
SECONDS = 1200  # until ranks that do not end are a failure; a slow test has twenty runs in one session


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_ranks(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """The processes of `function(*arguments)` in `world` ranks; each stores what it returns in `folder`."""
    SERVER.set_forkserver_preload(PRELOADED)
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        SERVER.Process(target=_run, args=(function, rank, world, port, folder, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each rank."""
    processes = start_ranks(function, world, folder, *arguments)
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
    assert codes == [0] * world, f"the ranks ended with {codes}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _run(
    function: Callable[..., Any], rank: int, world: int, port: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)  # sums have the same order in every process
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.save(function(*arguments), folder / f"rank{rank}.pt")
    _wait_for_the_others(folder, world)
    if dist.is_initialized():
        dist.destroy_process_group()


def _wait_for_the_others(folder: Path, world: int) -> None:
    """Connections stay open until every rank has its result: one that a rank still reads from must not be reset. A
    rank that failed has none."""
    end = time.monotonic() + CLOSE_SECONDS
    while time.monotonic() < end and not all((folder / f"rank{rank}.pt").exists() for rank in range(world)):
        time.sleep(0.01)
