"""One model for inference on several ranks: each reads its part of the folder, and all but the first then follow it.

What is wrong on any rank is an error of the first, which alone prints it; the others end without a word. SIGTERM and
SIGINT to the first rank end all; another one waits for the first to end, and ends by itself when it does not.
"""

import atexit
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

import torch
import torch.distributed as dist

from soli.checkpoint.load import load_checkpoint, model_folder
from soli.checkpoint.memory import Storage
from soli.checkpoint.part import PartialCheckpoint
from soli.checkpoint.writer import ProgressCallback
from soli.errors import SoliError
from soli.formats.quantized import SharedScale
from soli.kernels import QuantizedExperts, cpu
from soli.machine import available_memory
from soli.model.transformer import Transformer
from soli.parallel import GRACE
from soli.parallel.calls import IDLE, Leader, follow
from soli.parallel.model_part import ModelPart, possible_worlds
from soli.parallel.ranks import Ranks, connected, join_ranks, joined
from soli.parallel.tensor_parallel import share_layers

STOP_SECONDS: Final = 40.0  # after a signal to a rank that is not the first; torchrun's agent ends all after 30
T = TypeVar("T")


@dataclass(frozen=True)
class PartSettings:
    """How every rank loads its part, as `load_checkpoint` says; `memory`: bytes that weights, latent cache and scratch
    of a rank may take, None for what the machine has."""

    dtype: torch.dtype | None = None
    quantized: bool | None = None
    mtp: bool = True
    memory: int | None = None


def open_part(
    name_or_folder: str,
    ranks: Ranks,
    device: torch.device,
    choose_settings: Callable[[], PartSettings],
    progress: ProgressCallback,
) -> tuple[Transformer, Leader]:
    """The first rank's model, whose calls all ranks compute. On the others it does not return: they compute until the
    first rank ends, and then end the process. `choose_settings` may raise, as loading may."""
    if dist.is_initialized():
        raise SoliError("this process shares a model with other ranks already: use one model in each run of torchrun")

    def load(group: dist.ProcessGroup) -> Transformer:
        # Every rank sees what is available before the first of them takes some.
        settings, available = _agree(ranks, group, lambda: (choose_settings(), _available(ranks, device)))
        return _agree(
            ranks, group, lambda: load_part(name_or_folder, ranks, device, settings, available, progress)
        )

    if not ranks.is_first:
        _follow_to_the_end(ranks, device, load)
    with connected(ranks):
        group = join_group(ranks, device)
        model = load(group)
    leader = Leader(model, ranks.world, group)
    atexit.register(_end, leader)
    return model, leader


def _end(leader: Leader) -> None:
    """When the first rank ends. Connections that are open then have threads, which may abort a process that ends."""
    if leader.close() and dist.is_initialized():
        dist.destroy_process_group()


def join_group(ranks: Ranks, device: torch.device) -> dist.ProcessGroup:
    """Connect the ranks; the group in which the first one announces its calls. SoliError for ranks that differ."""
    join_ranks(ranks, device)
    group = dist.new_group(backend="gloo", timeout=IDLE)
    _agree(ranks, group, lambda: _check_alike(ranks, group))
    return group


def load_part(
    name_or_folder: str,
    ranks: Ranks,
    device: torch.device,
    settings: PartSettings,
    available: int | None = None,
    progress: ProgressCallback = lambda read, total: None,
) -> Transformer:
    """This rank's part of a model, which computes together with the others'. `available`: bytes that this rank can
    take, None for what it can now."""
    if available is None:
        available = _available(ranks, device)
    checkpoint = PartialCheckpoint(model_folder(name_or_folder), settings.mtp)
    part = ModelPart(checkpoint.config, ranks.rank, ranks.world, in_blocks=checkpoint.is_quantized)
    checkpoint.take(part.slot_part)
    if settings.memory is not None:
        _check_memory(checkpoint, ranks, device, settings)
    with warnings.catch_warnings():
        if not ranks.is_first:
            warnings.simplefilter("ignore")
        try:
            model = load_checkpoint(
                checkpoint,
                device,
                settings.dtype,
                quantized=settings.quantized,
                available=available if settings.memory is None else min(available, settings.memory),
                reshape=part.reshape,
                progress=progress if ranks.is_first else lambda read, total: None,
            )
        except SharedScale as error:
            raise SoliError(f"{error}; {_advice_on_blocks(checkpoint, ranks.world)}") from None
    share_layers(model, part)
    return model


def _check_memory(checkpoint: PartialCheckpoint, ranks: Ranks, device: torch.device, settings: PartSettings) -> None:
    """SoliError for a part that `settings.memory` does not hold: nothing of it is read from disk as it is needed."""
    quantized = settings.quantized is True or checkpoint.quantization.has_integers
    storage = Storage(settings.dtype or checkpoint.natural_dtype, device, quantized, in_place=False)
    size, memory = sum(storage.bytes_of(checkpoint)), settings.memory or 0
    if size > memory:
        raise SoliError(
            f"{checkpoint.folder}: the part of each of {ranks.world} processes takes {size:,} bytes, but {memory:,} "
            "are allowed, and several processes do not read experts from disk as they are needed: allow more, or use "
            "more processes"
        )


def _advice_on_blocks(checkpoint: PartialCheckpoint, world: int) -> str:
    """What to do where the parts of `world` ranks are no whole blocks."""
    fitting = []
    for other in possible_worlds(checkpoint.config):
        # The second rank's parts begin where the first's end: where these are whole blocks, all are.
        part = ModelPart(checkpoint.config, 1, other, in_blocks=True)
        checkpoint.take(part.slot_part)
        if not checkpoint.cuts_blocks():
            fitting.append(str(other))
    numbers = f"{' or '.join(fitting)} processes, or " if fitting else ""
    return f"{world} processes cannot share these blocks: use {numbers}--dtype bfloat16, which dequantizes them"


def weight_bytes(model: Transformer) -> int:
    """Bytes of all weights that this rank holds."""
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    total = sum(tensors.values())
    for module in model.modules():
        quantized = getattr(module, "quantized", None)
        if isinstance(quantized, QuantizedExperts):
            total += sum(weight.nbytes for weight in (*quantized.gates, *quantized.ups, *quantized.downs))
        elif quantized is not None:
            total += quantized.nbytes
    return total


def _available(ranks: Ranks, device: torch.device) -> int:
    """Bytes that this rank's weights may take: the ranks of a machine share what it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory(ranks.local_world)


def _check_alike(ranks: Ranks, group: dist.ProcessGroup) -> None:
    """SoliError where ranks would compute different bits from the same values: what all compute must agree."""
    if ranks.local == 0:
        cpu.native.library_or_reason()  # compiles it on a machine that does not have it yet
    _gather(None, ranks, group)
    kernels = cpu.native.library_or_reason()
    own = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": kernels.best_isa if isinstance(kernels, cpu.native.Library) else "none",
        "SOLI_KERNELS": os.environ.get("SOLI_KERNELS") or "unset",
        "SOLI_CPU_ISA": os.environ.get("SOLI_CPU_ISA") or "unset",
    }
    all_own = _gather(own, ranks, group)
    for rank, other in enumerate(all_own):
        for name, value in other.items():
            if value != all_own[0][name]:
                raise SoliError(
                    f"{name} is {value} on rank {rank} and {all_own[0][name]} on rank 0: ranks that share a model must "
                    "be alike"
                )


def _agree(ranks: Ranks, group: dist.ProcessGroup, action: Callable[[], T]) -> T:
    """The action's result, once every rank has one. Its error, or that of another rank, is raised by the first rank;
    the others end."""
    error: Exception | None = None
    try:
        result = action()
    except Exception as failure:
        error = failure
    sentences = _gather(None if error is None else _sentence(error), ranks, group)
    failed = next((rank for rank, sentence in enumerate(sentences) if sentence is not None), None)
    if failed is None:
        return result
    dist.destroy_process_group()  # else its threads may abort a process that ends
    if not ranks.is_first:
        time.sleep(GRACE)  # the agent ends all at the first that ends, which is to be the one that says why
        raise SystemExit(1)
    if error is not None:
        raise error
    raise SoliError(f"rank {failed}: {sentences[failed]}")


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, SoliError) else f"{type(error).__name__}: {error}"


def _gather(value: Any, ranks: Ranks, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value, group=group)
    return values


def _follow_to_the_end(
    ranks: Ranks, device: torch.device, load: Callable[[dist.ProcessGroup], Transformer]
) -> NoReturn:
    stop: _StopSignals | None = None
    try:
        with joined(ranks):
            group = join_group(ranks, device)
            stop = _StopSignals(ranks)  # before, a signal ends this process at once
            follow(load(group), device, group)
    except SoliError:
        if stop is None or not stop.received:
            raise
    raise SystemExit(0)


class _StopSignals:
    """SIGTERM and SIGINT on a rank that is not the first: the first rank ends the others, within its own time. When it
    does not, the signal was for this rank alone, and this process ends."""

    def __init__(self, ranks: Ranks) -> None:
        self.received = False
        self._rank = ranks.rank
        if threading.current_thread() is not threading.main_thread():
            return
        self._reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._writer = writer  # Python's handlers wait for the main thread, which waits in a collective
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="soli-signals", daemon=True).start()

    def _watch(self) -> None:
        number = signal.Signals(self._reader.recv(1)[0])
        self.received = True
        time.sleep(STOP_SECONDS)
        print(f"soli: rank {self._rank}: ended by {number.name}", file=sys.stderr, flush=True)
        os._exit(1)
