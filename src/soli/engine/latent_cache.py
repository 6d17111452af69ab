"""The latent cache of multi-head latent attention: what a token leaves behind for later tokens to attend to.

DeepSeek-V3 keeps, per token and layer, the compressed latent c_t^KV and the decoupled rotary key k_t^R (eqs. 1 and
3): X = kv_lora_rank + qk_rope_head_dim values instead of a key and a value per head. They are stored in KV blocks of S
tokens. A row is one text; its block table names the block of its positions 0..S-1, of the next S, and so on. A step has
new tokens of some rows, one row after the other, as one flat sequence of T tokens.

`LatentCache` holds the blocks and addresses them; `BlockManager` counts who refers to them, and finds full blocks again
for prompts that begin alike. A block is free, referenced (by one sequence, or by several that share a prefix), or
evictable: referenced by nobody, its content still registered under its key and reused by the next prompt that begins
with the same tokens. A key stands for all tokens from the first to the block's last, so a block is found only behind
the blocks before it.

Shapes: B rows of a step, T its tokens, P KV blocks, M blocks that a row may have.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import add
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soli.config import ModelConfig
from soli.errors import SoliError
from soli.model.cache import Entry, PrefillChunk, copy_blocks

CPU = torch.device("cpu")
# Up to so many new tokens of one text are queries by themselves (absorbed attention); more are a chunk (expanded).
MAX_ABSORBED_TOKENS = 4


class LatentCache:
    """`block_count` KV blocks of `block_size` tokens in each layer, and block tables for `rows` rows of up to
    `positions` tokens.

    A layer's blocks are allocated when it first writes, in the dtype and on the device of what it writes; on a CPU they
    take memory as they fill. SoliError for positions past the end of a table.
    """

    def __init__(self, block_count: int, block_size: int, rows: int, positions: int) -> None:
        self.block_count, self.block_size = block_count, block_size
        self.positions = positions
        self.block_tables_RM = np.zeros((rows, blocks_for(positions, block_size)), dtype=np.int32)
        self._layers: dict[tuple[int, Entry], Tensor] = {}
        self._copied: list[tuple[int, int]] = []  # since the last step

    @classmethod
    def whole_rows(cls, lengths: Sequence[int], block_size: int = 64) -> "LatentCache":
        """A cache in which row r has blocks for `lengths[r]` positions from the start."""
        needed = [blocks_for(length, block_size) for length in lengths]
        cache = cls(sum(needed), block_size, len(lengths), max(lengths, default=0))
        for row, (end, count) in enumerate(zip(np.cumsum(needed), needed, strict=True)):
            cache.block_tables_RM[row, :count] = np.arange(end - count, end)
        return cache

    def step(
        self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: str | torch.device = "cpu"
    ) -> "CacheStep":
        """The step with `counts[b]` tokens of `rows[b]` from position `starts[b]`. Counts up to MAX_ABSORBED_TOKENS
        come first: their tokens are queries by themselves, each with its own length."""
        last = max(map(add, starts, counts))
        if last > self.positions:
            raise SoliError(
                f"position {last - 1} is past the {self.positions} positions of this cache: use a shorter text"
            )
        row_B, start_B = np.array(rows, dtype=np.int64), np.array(starts, dtype=np.int64)
        if max(counts) == 1:  # decoding alone: the result of the general case, in less time
            return self._step(row_B, start_B, len(row_B), last, [], device)
        count_B = np.array(counts, dtype=np.int64)
        end_B = start_B + count_B  # positions
        stop_B = np.cumsum(count_B)  # tokens of the step
        position_T = np.arange(stop_B[-1]) - np.repeat(stop_B - end_B, count_B)
        row_T = np.repeat(row_B, count_B)
        many = np.flatnonzero(count_B > MAX_ABSORBED_TOKENS)
        num_decode_tokens = int(stop_B[many[0]] - count_B[many[0]]) if len(many) else int(stop_B[-1])
        chunks = []
        for row, start, end, stop in zip(row_B, start_B, end_B, stop_B, strict=True):
            if stop > num_decode_tokens:
                slots_S = self.slots(row, np.arange(end), device)
                chunks.append(PrefillChunk(int(stop - (end - start)), int(stop), int(start), slots_S))
        longest = int(position_T[:num_decode_tokens].max(initial=0)) + 1
        return self._step(row_T, position_T, num_decode_tokens, longest, chunks, device)

    def _step(
        self,
        row_T: NDArray[np.int64],
        position_T: NDArray[np.int64],
        num_decode_tokens: int,
        longest: int,
        chunks: Sequence[PrefillChunk],
        device: str | torch.device,
    ) -> "CacheStep":
        """Tokens by row and position; the first `num_decode_tokens` attend to up to `longest` slots."""
        table_width = blocks_for(longest, self.block_size)
        copied, self._copied = self._copied, []
        return CacheStep(
            cache=self,
            positions_T=_tensor(position_T, device),
            rows_T=row_T,
            num_decode_tokens=num_decode_tokens,
            table_BM=_tensor(self.block_tables_RM[row_T[:num_decode_tokens], :table_width], device),
            lengths_B=_tensor((position_T[:num_decode_tokens] + 1).astype(np.int32), device),
            chunks=chunks,
            copied=copied,
        )

    def kv_blocks(self, layer: int, width: int, like: Tensor, entry: Entry = "latent") -> Tensor:
        """A layer's blocks (P, S, width), allocated at the first call, in the dtype and on the device of `like`."""
        if (layer, entry) not in self._layers:
            self._layers[layer, entry] = like.new_empty(self.block_count, self.block_size, width)
        return self._layers[layer, entry]

    def slots(
        self, rows: int | NDArray[np.int64], position_T: NDArray[np.int64], device: str | torch.device
    ) -> Tensor:
        """The slots of tokens in the flattened blocks: (T,). `rows`: the row of each, or of all."""
        index_T, offset_T = np.divmod(position_T, self.block_size)
        blocks_T = self.block_tables_RM[rows, index_T].astype(np.int64)
        return _tensor(blocks_T * self.block_size + offset_T, device)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks in every layer, from the first of each pair to the second; no block is in both places."""
        copy_blocks(self._layers.values(), copies)
        self._copied += copies

    def nbytes(self) -> int:
        """Bytes of the allocated blocks, empty slots included."""
        return sum(blocks_PSX.nbytes for blocks_PSX in self._layers.values())


@dataclass(frozen=True)
class CacheStep:
    """The new tokens of one step, as attention sees the cache (`soli.model.attention.Cache`). `copied`: the blocks that
    were copied before it, which another holder of the same blocks has to do as well."""

    cache: LatentCache
    positions_T: Tensor  # int64
    rows_T: NDArray[np.int64]  # the row of each token
    num_decode_tokens: int
    table_BM: Tensor
    lengths_B: Tensor
    chunks: Sequence[PrefillChunk]
    copied: Sequence[tuple[int, int]] = ()

    @cached_property
    def slots_T(self) -> Tensor:
        """The slot that each token is written to, int64."""
        return self.cache.slots(self.rows_T, self.positions_T.cpu().numpy(), self.positions_T.device)

    def kv_blocks(self, layer: int, width: int, like: Tensor, entry: Entry = "latent") -> Tensor:
        """A layer's blocks, for a forward pass that writes to them itself."""
        return self.cache.kv_blocks(layer, width, like, entry)

    def write(self, layer: int, entries_TX: Tensor, entry: Entry = "latent") -> Tensor:
        """Store the step's entries of one layer; its blocks."""
        kv_PSX = self.kv_blocks(layer, entries_TX.shape[1], entries_TX, entry)
        kv_PSX.flatten(0, 1).index_copy_(0, self.slots_T, entries_TX)
        return kv_PSX


class BlockManager:
    """`block_count` blocks. Each reference to a block is released once.

    Allocation takes free blocks first, then evicts the least recently used ones.
    """

    def __init__(self, block_count: int) -> None:
        self.block_count = block_count
        self._free = list(range(block_count - 1, -1, -1))
        self._reference_counts = [0] * block_count
        self._keys: dict[int, bytes] = {}  # of the registered blocks
        self._blocks_by_key: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    @property
    def available(self) -> int:
        """Blocks that `allocate` could give now."""
        return len(self._free) + len(self._evictable)

    @property
    def used(self) -> int:
        """Blocks with a reference."""
        return self.block_count - self.available

    def allocate(self) -> int | None:
        """A block with one reference and undefined content; None when every block is referenced."""
        if self._free:
            block = self._free.pop()
        elif self._evictable:
            block, _ = self._evictable.popitem(last=False)
            del self._blocks_by_key[self._keys.pop(block)]
        else:
            return None
        self._reference_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One reference more to a block that has one."""
        if self._reference_counts[block] < 1:
            raise ValueError(f"block {block} has no reference to share")
        self._reference_counts[block] += 1

    def acquire(self, key: bytes) -> int | None:
        """The block registered under `key`, with one reference more; None without one."""
        block = self._blocks_by_key.get(key)
        if block is not None:
            self._evictable.pop(block, None)
            self._reference_counts[block] += 1
        return block

    def count_registered(self, keys: Sequence[bytes]) -> int:
        """How many of these keys, from the first on, have a block."""
        return next((at for at, key in enumerate(keys) if key not in self._blocks_by_key), len(keys))

    def count_evictable(self, keys: Sequence[bytes]) -> int:
        """How many of these keys have a block without a reference: acquiring them makes so many unavailable."""
        return sum(self._blocks_by_key.get(key) in self._evictable for key in keys)

    def register(self, block: int, key: bytes) -> None:
        """The block is full and has this content. Where another block already has it, this one stays unregistered."""
        if key not in self._blocks_by_key:
            self._blocks_by_key[key] = block
            self._keys[block] = key

    def release(self, block: int) -> None:
        """One reference less; a block without references is evictable if it is registered, else free."""
        if self._reference_counts[block] < 1:
            raise ValueError(f"block {block} has no reference to release")
        self._reference_counts[block] -= 1
        if self._reference_counts[block] == 0:
            if block in self._keys:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def clear_prefix_cache(self) -> None:
        """Unregister every block; referenced blocks stay referenced."""
        self._free += self._evictable
        self._evictable.clear()
        self._keys.clear()
        self._blocks_by_key.clear()


def _tensor(array: NDArray[Any], device: str | torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device == CPU else tensor.to(device)  # a step of a small model is mostly such calls


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // block_size)


def bytes_per_token(config: ModelConfig, layers: int, dtype: torch.dtype) -> int:
    """Bytes of one token in the cache of so many layers, those of the model and then its MTP modules: 576 values a
    layer in V3 (DeepSeek-V2 report, table 1), and 128 of an indexer's key in V3.2."""
    index_keys = config.num_indexers(layers - config.num_hidden_layers) * (config.index_head_dim or 0)
    return (layers * (config.kv_lora_rank + config.qk_rope_head_dim) + index_keys) * dtype.itemsize


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block that follows `parent` (the key of the block before it; for the first, whatever the content
    depends on besides tokens) and holds these tokens. 256 bits of BLAKE2: no accidental collisions."""
    return hashlib.blake2b(parent + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=32).digest()
