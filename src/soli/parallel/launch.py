"""Several processes on this machine, started and watched by torchrun's elastic agent: `soli VERB --processes N`."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from soli.errors import SoliError

# What it logs of a rank that failed is said by describe_failure, or by that rank.
logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)


def launch(arguments: Sequence[str], processes: int) -> int:
    """As `run_together`, for a run that the same command resumes."""
    try:
        return run_together(arguments, processes)
    except SoliError as error:
        raise SoliError(f"{error}; run the same command to resume") from None


def run_together(arguments: Sequence[str], processes: int) -> int:
    """The exit status of `soli ARGUMENTS` in `processes` ranks, of which the first prints: that of the one that failed
    first. SoliError names a rank that a signal ended.

    When one fails, the agent ends the others, at the latest after 30 seconds.
    """
    try:
        _run(arguments, processes)
    except ChildFailedError as error:
        failure = error.failures[_first_failure(error.failures)]
        if failure.exitcode > 0:
            return failure.exitcode  # its message is above
        raise SoliError(describe_failure(error.failures)) from None
    except SignalException as stop:
        if stop.sigval == signal.SIGINT and arguments[:1] not in (["serve"], ["train"]):
            return 130  # the first rank has said so; a server has answered, a run is saved
    return 0


def _run(arguments: Sequence[str], processes: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    elastic_launch(config, sys.executable)("-m", "soli", *arguments)


def describe_failure(failures: Mapping[int, ProcessFailure]) -> str:
    """Which rank failed first and how: one that a signal ended, before those that then lost their connection to it."""
    rank = _first_failure(failures)
    failure = failures[rank]
    if failure.exitcode < 0:
        end = f"was ended by {failure.signal_name()}"
    else:
        end = f"ended with status {failure.exitcode}; its message is above"
    return f"rank {rank} (process {failure.pid}) {end}, and the others were stopped"


def _first_failure(failures: Mapping[int, ProcessFailure]) -> int:
    """A rank that a signal ended, else one that ended by itself; SIGTERM is what the agent sends to the others."""

    def order(rank: int) -> tuple[int, int]:
        exitcode = failures[rank].exitcode
        return (2 if exitcode == -signal.SIGTERM else int(exitcode > 0)), failures[rank].timestamp

    return min(failures, key=order)
