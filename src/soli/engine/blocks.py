"""The KV blocks of the latent cache: reference counts, and a prefix cache of full blocks for prompts that begin alike.

A block is free, referenced (by one sequence, or by several that share a prefix), or evictable: referenced by nobody,
its content still registered under its key and reused by the next prompt that begins with the same tokens. Allocation
takes free blocks first, then evicts the least recently used ones. A key stands for all tokens from the first to the
block's last, so a block is found only behind the blocks before it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class BlockManager:
    """`block_count` blocks. Each reference to a block is released once."""

    def __init__(self, block_count: int) -> None:
        self.block_count = block_count
        self._free = list(range(block_count - 1, -1, -1))
        self._reference_counts = [0] * block_count
        self._keys: list[bytes | None] = [None] * block_count
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
            self._unregister(block)
        else:
            return None
        self._reference_counts[block] = 1
        return block

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
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._evictable[block] = None

    def clear_prefix_cache(self) -> None:
        """Unregister every block; referenced blocks stay referenced."""
        for block in self._evictable:
            self._unregister(block)
            self._free.append(block)
        self._evictable.clear()
        for block in [*self._blocks_by_key.values()]:
            self._unregister(block)

    def _unregister(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._blocks_by_key[key]
            self._keys[block] = None


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block that follows `parent` (the key of the block before it; for the first, whatever the content
    depends on besides tokens) and holds these tokens. 256 bits of BLAKE2: no accidental collisions."""
    return hashlib.blake2b(parent + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=32).digest()
