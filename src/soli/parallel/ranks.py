"""The processes that share a run, called ranks: who this one is, its share of a batch, and what all of them agree on.

`ALONE` is the only rank of a run of one process. It offers the same operations, which then return their argument, so
that what runs on one process and on many is one code; torch.distributed is then not imported.

Sums over ranks are taken in the order of the ranks: each of them computes the same bits, and two ranks those of one
process that adds two micro-batches.
"""

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor

from soli.errors import SoliError
from soli.parallel import GRACE

LOST: Final = re.compile(r"gloo|nccl|connection|timed? ?out|peer", re.IGNORECASE)  # in errors of collectives
CLOSE_SECONDS: Final = 5.0  # for connections in use by a collective that other ranks do not take part in
TIMEOUT: Final = timedelta(minutes=10)  # of a collective: the first rank may have to evaluate or to read data alone


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes, and among the `local_world` of its own machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1
    group: Any = None  # of torch.distributed, where they are not all processes

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, and writes what belongs to the whole run."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, for small tensors."""
        if self.world == 1:
            return tensor
        total = torch.zeros_like(tensor)
        for part in self.gather(tensor):
            total += part
        return total

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each rank, in the order of ranks; all have one shape."""
        if self.world == 1:
            return [tensor]
        import torch.distributed as dist

        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def any(self, flags: int) -> int:
        """The bits that are set on at least one rank."""
        for other in self.gather(torch.tensor(flags)):
            flags |= int(other)
        return flags

    def all_objects(self, value: Any) -> list[Any]:
        """The value of each rank, in the order of ranks; plain Python values."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def of_first(self, value: Any) -> Any:
        """The first rank's value; also a point that no rank passes before the first has reached it."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]


ALONE: Final = Ranks()


def launched_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """What torchrun says about this process in its environment; ALONE where it did not start it."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    values = [environment.get(name, default) for name, default in defaults.items()]
    if not all(value.isdecimal() for value in values) or not int(values[0]) < int(values[1]):
        shown = ", ".join(f"{name}={value!r}" for name, value in zip(defaults, values, strict=True))
        raise SoliError(f"the environment has {shown}; start several processes with torchrun, or unset these")
    return Ranks(*map(int, values))


def join_ranks(ranks: Ranks, device: torch.device) -> None:
    """Connect this process with the others; NCCL between GPUs, gloo between CPUs and for Python values."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if ranks.world == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        # Its own keys in the store for each attempt of torchrun --max-restarts: the agent's store still has the
        # addresses of the attempt before. Of several machines only some count a restart.
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=TIMEOUT))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if ranks.local_world == ranks.world else "0"
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise SoliError(
            f"rank {ranks.rank} of {ranks.world} cannot reach the others ({str(error).splitlines()[0]}); start it with "
            "torchrun, or with --processes"
        ) from None


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded parameter, gradient or moment, sharing its storage; a plain tensor itself."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor, whose module is not imported for this
    return local


def own_values(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor with the shape of the parameter `like`; all of it where that is not sharded."""
    chunks = getattr(like, "__create_chunk_list__", None)  # of a DTensor, which distributed checkpoints ask too
    if chunks is not None:
        (chunk,) = chunks()
        for dimension, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            whole = whole.narrow(dimension, min(offset, whole.shape[dimension]), size)
    return whole


@contextmanager
def connected(ranks: Ranks) -> Iterator[None]:
    """Computing together; SoliError where a connection was lost because another rank ended."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not LOST.search(str(error)):
            raise
        # The agent that started the ranks names the one that failed first, if the others are still there.
        time.sleep(GRACE)
        raise SoliError(describe_lost(error)) from None


def describe_lost(error: RuntimeError) -> str:
    """What an error of a collective says about the other ranks."""
    reason = str(error).splitlines()[0][:200]
    return f"the connection to another rank was lost: it ended, or does not answer ({reason})"


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """`connected` to the end of what the ranks do together; connections are closed at an error, too.

    The first rank says at once what went wrong, and ends. The agent then ends the others, which wait for it with their
    connections open: what all of them would say is said once, and none of them takes the loss of another for the cause.
    """
    try:
        with connected(ranks):
            yield
    except BaseException:
        if not ranks.is_first:
            time.sleep(GRACE)
        close_connections(ranks)
        raise
    close_connections(ranks)


def close_connections(ranks: Ranks) -> None:
    """Of a rank that ends: the threads of open ones may abort its process. What another rank still waits for is left to
    its end."""
    if ranks.world == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        closing = threading.Thread(target=dist.destroy_process_group, name="soli-close", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
