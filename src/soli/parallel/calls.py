"""Inference on several ranks: what the first one calls of its model, the others call of theirs, with the same values.

The first rank has the engine: scheduler, sampler, server. Its model's three entry points (`backbone`, `mtp_step`,
`head`) announce each call, with the step's metadata of the latent cache, and then compute their part; the other ranks
`follow`. Every rank has a latent cache of its own, with the same blocks: the latents are those of all heads.

The first rank may be idle for any time; a rank that ends closes its connections, which the others notice at once. An
error in the middle of a call leaves ranks waiting for each other, so nothing is computed together after it.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from soli.errors import SoliError
from soli.model.cache import Cache, Entry, PrefillChunk, copy_blocks
from soli.model.transformer import Transformer
from soli.parallel import GRACE
from soli.parallel.ranks import LOST, describe_lost

ENTRY_POINTS: Final = ("backbone", "mtp_step", "head")
IDLE: Final = timedelta(days=3650)  # between two calls, and between the ends of two ranks' loading
CLOSE_SECONDS: Final = 5.0  # for a call that is being computed when the process ends
CPU: Final = torch.device("cpu")


class _Blocks(Protocol):
    block_count: int
    block_size: int


class BlockStep(Cache, Protocol):
    """A step of a latent cache in blocks, as the engine has it."""

    @property
    def cache(self) -> _Blocks: ...
    @property
    def slots_T(self) -> Tensor: ...
    @property
    def copied(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class StepMetadata:
    """A step of the latent cache number `cache`, of so many blocks, without what is in them."""

    cache: int
    block_count: int
    block_size: int
    num_decode_tokens: int
    table_BM: Tensor
    lengths_B: Tensor
    chunks: Sequence[PrefillChunk]
    slots_T: Tensor
    copied: Sequence[tuple[int, int]]  # blocks, from and to, before the step


@dataclass(frozen=True)
class Call:
    """A call of an entry point; tensors are on the CPU. `freed`: numbers of caches that are not used any more."""

    name: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    freed: Sequence[int] = ()


class Leader:
    """Announces the calls of `model`, which is the first rank's, from now on. `on_failure` is called when nothing is
    computed together any more, with the reason."""

    def __init__(self, model: Transformer, world: int, group: dist.ProcessGroup) -> None:
        self.world = world
        self.on_failure: Callable[[str], None] = lambda reason: None
        self._group = group
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._cache_numbers: weakref.WeakKeyDictionary[_Blocks, int] = weakref.WeakKeyDictionary()
        self._numbers = count()
        self._freed: deque[int] = deque()  # appended to by the garbage collector, in any thread
        for name in ENTRY_POINTS:
            setattr(model, name, self._announced(name, getattr(model, name)))

    def close(self) -> bool:
        """Tell the other ranks that no call follows; False while one is being computed, which goes on."""
        if not self._lock.acquire(timeout=CLOSE_SECONDS):
            return False  # the end of this process will tell them
        try:
            if self._failure is None:
                self._failure = "the ranks have ended"
                with suppress(RuntimeError):  # of a rank that has ended before
                    _broadcast(None, self._group)
        finally:
            self._lock.release()
        return True

    def _announced(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                if self._failure is not None:
                    raise SoliError(self._failure)
                try:
                    encoded = tuple(map(self._encode, arguments))
                    freed = [self._freed.popleft() for _ in range(len(self._freed))]
                    named = {key: self._encode(value) for key, value in options.items()}
                    _broadcast(Call(name, encoded, named, freed), self._group)
                    return method(*arguments, **options)
                except BaseException as error:
                    self._failure = _describe(error)
                    is_lost = isinstance(error, RuntimeError) and LOST.search(str(error)) is not None
                    if is_lost:
                        time.sleep(GRACE)  # whoever started the ranks names the one that ended, and ends this one
                    self.on_failure(self._failure)
                    if is_lost:
                        raise SoliError(self._failure) from None
                    raise

        return call

    def _encode(self, value: Any) -> Any:
        """An argument as the other ranks are sent it."""
        if isinstance(value, Tensor):
            return value.to(CPU)
        if isinstance(value, Mapping):
            return {key: self._encode(item) for key, item in value.items()}
        return self._metadata(value) if hasattr(value, "slots_T") else value

    def _metadata(self, step: BlockStep) -> StepMetadata:
        cache = step.cache
        number = self._cache_numbers.get(cache)
        if number is None:
            number = self._cache_numbers[cache] = next(self._numbers)
            weakref.finalize(cache, self._freed.append, number)
        return StepMetadata(
            number,
            cache.block_count,
            cache.block_size,
            step.num_decode_tokens,
            step.table_BM.to(CPU),
            step.lengths_B.to(CPU),
            [PrefillChunk(chunk.start, chunk.stop, chunk.first, chunk.slots_S.to(CPU)) for chunk in step.chunks],
            step.slots_T.to(CPU),
            step.copied,
        )


def follow(model: Transformer, device: torch.device, group: dist.ProcessGroup) -> None:
    """Compute this rank's part of every call of the first rank, until that ends."""
    caches: dict[int, _OwnBlocks] = {}

    def decode(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, Mapping):
            return {key: decode(item) for key, item in value.items()}
        if isinstance(value, StepMetadata):
            blocks = caches.setdefault(value.cache, _OwnBlocks(value.block_count, value.block_size))
            return _FollowedStep(value, blocks, device)
        return value

    with torch.inference_mode():
        while (call := _broadcast(None, group)) is not None:
            for number in call.freed:
                caches.pop(number, None)
            options = {key: decode(value) for key, value in call.options.items()}
            getattr(model, call.name)(*map(decode, call.arguments), **options)


@dataclass
class _OwnBlocks:
    """This rank's blocks of one latent cache of the first rank."""

    block_count: int
    block_size: int
    layers: dict[tuple[int, Entry], Tensor] = field(default_factory=dict)


class _FollowedStep:
    """A step with this rank's blocks, as attention sees it."""

    def __init__(self, metadata: StepMetadata, blocks: _OwnBlocks, device: torch.device) -> None:
        self._blocks = blocks
        copy_blocks(blocks.layers.values(), metadata.copied)
        self.num_decode_tokens = metadata.num_decode_tokens
        self.table_BM, self.lengths_B = metadata.table_BM.to(device), metadata.lengths_B.to(device)
        self.slots_T = metadata.slots_T.to(device)
        self.chunks = [
            PrefillChunk(chunk.start, chunk.stop, chunk.first, chunk.slots_S.to(device)) for chunk in metadata.chunks
        ]

    def kv_blocks(self, layer: int, width: int, like: Tensor, entry: Entry = "latent") -> Tensor:
        layers, shape = self._blocks.layers, (self._blocks.block_count, self._blocks.block_size, width)
        if (layer, entry) not in layers:
            layers[layer, entry] = like.new_empty(shape)
        return layers[layer, entry]

    def write(self, layer: int, entries_TX: Tensor, entry: Entry = "latent") -> Tensor:
        kv_PSX = self.kv_blocks(layer, entries_TX.shape[1], entries_TX, entry)
        kv_PSX.flatten(0, 1).index_copy_(0, self.slots_T, entries_TX)
        return kv_PSX


def _broadcast(call: Call | None, group: dist.ProcessGroup) -> Call | None:
    """The first rank's call, on every rank; None is the end."""
    values = [call]
    dist.broadcast_object_list(values, src=0, group=group, device=CPU)
    return values[0]


def _describe(error: BaseException) -> str:
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
        return describe_lost(error)
    return f"the ranks stopped computing together after an error ({type(error).__name__}); start them again"
