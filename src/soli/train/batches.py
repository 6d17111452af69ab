"""Windows of the packed corpus in an order that depends on the seed and the position alone.

The corpus is one long run of documents (`train.bin`, little-endian integers). Window n of the global order belongs to
epoch n // windows; each epoch shifts where windows begin and permutes them, both drawn from (seed, epoch). So resuming
needs one integer, and any number of ranks or loader workers would see the same sequence. Windows may begin and end
inside a document: documents are packed, with no mask between them (section 4.1).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soli.errors import SoliError


class PackedTokens:
    """A memory-mapped file of token ids. `split` is "train" or "valid"."""

    def __init__(self, folder: Path, split: str) -> None:
        meta, file = folder / "meta.json", folder / f"{split}.bin"
        for needed in (meta, file):
            if not needed.is_file():
                raise SoliError(f"{needed} is missing; build the data first with: soli data build RECIPE")
        self.file = file
        try:
            self.meta: dict[str, object] = json.loads(meta.read_text(encoding="utf-8"))
            self.ids = np.memmap(file, dtype=np.dtype(str(self.meta["dtype"])).newbyteorder("<"), mode="r")
        except (ValueError, KeyError, TypeError) as error:
            raise SoliError(f"{meta} and {file.name} cannot be read together ({error}); build the data again") from None
        expected = self.meta.get(f"{split}_tokens")
        if expected != len(self.ids):
            raise SoliError(
                f"{file} holds {len(self.ids):,} tokens, but meta.json says {expected}; build the data again"
            )

    def windows(self, starts: np.ndarray, width: int) -> Tensor:
        """Token ids from each start on, `width` of them (int64, BW)."""
        return torch.from_numpy(self.ids[starts[:, None] + np.arange(width)].astype(np.int64))


class Batches:
    """The training order: `take(position, count)` gives windows position .. position + count - 1.

    Consecutive windows of an epoch start `length` tokens apart and are `length + extra` wide (`extra`: the tokens that
    only serve as targets), so every token is predicted once an epoch.
    """

    def __init__(self, tokens: PackedTokens, length: int, extra: int, seed: int) -> None:
        self.tokens, self.length, self.width, self.seed = tokens, length, length + extra, seed
        self.per_epoch = (len(tokens.ids) - self.width - length) // length
        if self.per_epoch < 1:
            raise SoliError(
                f"{tokens.file} holds {len(tokens.ids):,} tokens, too few for windows of {self.width}; "
                "shorten the sequence_length that asks for them, or give more text"
            )
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        draw = np.random.default_rng([self.seed, epoch])
        offset = int(draw.integers(self.length))
        return offset + draw.permutation(self.per_epoch) * self.length

    def take(self, position: int, count: int) -> Tensor:
        """Windows `position` .. `position + count - 1` of the global order (int64, BW)."""
        starts = [self._order(n // self.per_epoch)[n % self.per_epoch] for n in range(position, position + count)]
        return self.tokens.windows(np.array(starts), self.width)


def rank_slice(position: int, count: int, rank: int, world: int) -> tuple[int, int]:
    """(position, count) of one rank's share of windows `position` .. `position + count - 1`.

    Shares are runs whose lengths differ by one at most; in the order of ranks they join to the whole, for any `world`.
    """
    first, last = rank * count // world, (rank + 1) * count // world
    return position + first, last - first


def heldout_windows(tokens: PackedTokens, length: int, extra: int, budget: int) -> Tensor:
    """Up to `budget` tokens of non-overlapping windows, spread evenly over the file (int64, BW)."""
    available = (len(tokens.ids) - extra) // length
    if available < 1:
        raise SoliError(
            f"{tokens.file} holds {len(tokens.ids):,} tokens, too few for one window of {length + extra}; shorten the "
            "sequence_length that asks for it, or hold out more text"
        )
    count = min(available, max(1, budget // length))
    picked = np.linspace(0, available - 1, count).round().astype(np.int64)
    return tokens.windows(picked * length, length + extra)
