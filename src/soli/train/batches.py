"""Windows of the packed corpus in an order that depends only on the seed and the position.

The corpus is one long sequence of documents (`train.bin`, little-endian integers). Window n of the global order belongs
to epoch n // windows; each epoch shifts where windows start and permutes them, both drawn from (seed, epoch). So
resuming needs one integer, and any number of ranks or loader workers would see the same sequence. Windows may start and
end inside a document: documents are packed, with no mask between them (section 4.1).
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soli.data.token_files import map_tokens, read_meta, stored_dtype
from soli.errors import SoliError


class PackedTokens:
    """A memory-mapped file of token ids. `split` is "train" or "valid"."""

    def __init__(self, folder: Path, split: str) -> None:
        self.file = folder / f"{split}.bin"
        self.meta = read_meta(folder)
        self.ids = map_tokens(self.file, stored_dtype(self.meta))

    def windows(self, starts: np.ndarray, width: int) -> Tensor:
        """Token ids from each start on, `width` of them (int64, BW). SoliError for one outside the vocabulary."""
        ids_BW = self.ids[starts[:, None] + np.arange(width)].astype(np.int64)
        vocab_size = self.meta.get("vocab_size")
        if vocab_size is not None and ids_BW.size and ids_BW.max() >= vocab_size:
            raise SoliError(
                f"{self.file} holds token {ids_BW.max():,}, but its vocabulary has {vocab_size:,}: build it again"
            )
        return torch.from_numpy(ids_BW)


class Batches:
    """The training order: `take(position, count)` returns windows position .. position + count - 1.

    Consecutive windows of an epoch start `length` tokens apart and are `length + extra` wide (`extra`: tokens that
    are targets only), so every token is predicted once an epoch.
    """

    def __init__(self, tokens: PackedTokens, length: int, extra: int, seed: int) -> None:
        self.tokens, self.length, self.width, self.seed = tokens, length, length + extra, seed
        self.per_epoch = (len(tokens.ids) - self.width - length) // length
        if self.per_epoch < 1:
            raise SoliError(
                f"{tokens.file} holds {len(tokens.ids):,} tokens, too few for windows of {self.width}; "
                "reduce the sequence_length that needs them, or add text"
            )
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        offset = int(generator.integers(self.length))
        return offset + generator.permutation(self.per_epoch) * self.length

    def take(self, position: int, count: int) -> Tensor:
        """Windows `position` .. `position + count - 1` of the global order (int64, BW)."""
        starts = [self._order(n // self.per_epoch)[n % self.per_epoch] for n in range(position, position + count)]
        return self.tokens.windows(np.array(starts), self.width)


def rank_slice(position: int, count: int, rank: int, world: int) -> tuple[int, int]:
    """(position, count) of one rank's share of windows `position` .. `position + count - 1`.

    Shares are contiguous and differ in length by at most one; in the order of ranks they cover the whole batch.
    """
    first = rank * count // world
    end = (rank + 1) * count // world
    return position + first, end - first


def heldout_windows(tokens: PackedTokens, length: int, extra: int, budget: int) -> Tensor:
    """Up to `budget` tokens of non-overlapping windows, spread evenly over the file (int64, BW)."""
    available = (len(tokens.ids) - extra) // length
    if available < 1:
        raise SoliError(
            f"{tokens.file} holds {len(tokens.ids):,} tokens, too few for one window of {length + extra}; shorten the "
            "sequence_length that needs it, or hold out more text"
        )
    count = min(available, max(1, budget // length))
    chosen = np.linspace(0, available - 1, count).round().astype(np.int64)
    return tokens.windows(chosen * length, length + extra)
