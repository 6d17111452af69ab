"""Several processes on this machine, started and watched by torchrun's elastic agent: `soli train --processes N`."""

import os
import sys
import uuid
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from soli.errors import SoliError


def launch(arguments: Sequence[str], processes: int) -> None:
    """Run `soli ARGUMENTS` in `processes` ranks until all end; SoliError names the rank that failed.

    When one fails, the agent ends the others, at the latest after 30 seconds.
    """
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
    try:
        elastic_launch(config, sys.executable)("-m", "soli", *arguments)
    except ChildFailedError as error:
        raise SoliError(describe_failure(error.failures)) from None
    except SignalException:
        pass  # the agent passed the signal on, and every rank has saved its state


def describe_failure(failures: Mapping[int, ProcessFailure]) -> str:
    """Which rank failed first and how: one that a signal ended, before those that then lost their connection to it."""
    rank = min(failures, key=lambda rank: (failures[rank].exitcode > 0, failures[rank].timestamp))
    failure = failures[rank]
    if failure.exitcode < 0:
        end = f"was ended by {failure.signal_name()}"
    else:
        end = f"ended with status {failure.exitcode}; its message is above"
    return f"rank {rank} (process {failure.pid}) {end}, and the others were stopped; run the same command to resume"
