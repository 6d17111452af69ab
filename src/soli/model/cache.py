"""The latent cache as attention sees it: what earlier tokens have left behind, and the new tokens of one step.

Shapes: T tokens, B decode tokens, P KV blocks of S slots, M blocks of a block table's row, C latent, R rotary width,
I width of an indexer's key.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

# What a token leaves in a layer: its latent and rotated key, X = C + R values; with an indexer that one's key, X = I.
Entry = Literal["latent", "index_key"]


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens start..stop-1 of a step, all of one text, at positions from `first` on. `slots_S`: the slot, in the
    flattened KV blocks, of each position from 0 to that of the last token."""

    start: int
    stop: int
    first: int
    slots_S: Tensor


class Cache(Protocol):
    """Latents of earlier tokens, and the new tokens of one step: T tokens of several texts, batch and time flattened.

    The first `num_decode_tokens` tokens are queries by themselves: token b attends to the first `lengths_B[b]` (int32)
    slots of the KV blocks in `table_BM[b]` (int32); its own is the last of them. Several may be of one text. The rest
    are `chunks`, in order. P KV blocks have S slots each.
    """

    @property
    def num_decode_tokens(self) -> int: ...
    @property
    def table_BM(self) -> Tensor: ...
    @property
    def lengths_B(self) -> Tensor: ...
    @property
    def chunks(self) -> Sequence[PrefillChunk]: ...
    def kv_blocks(self, layer: int, width: int, like: Tensor, entry: Entry = "latent") -> Tensor:
        """The layer's KV blocks (P, S, width), contiguous, in the dtype and on the device of `like`."""
        ...

    def write(self, layer: int, entries_TX: Tensor, entry: Entry = "latent") -> Tensor:
        """Store what each token leaves; return the layer's KV blocks, (P, S, X)."""
        ...


def copy_blocks(layers: Iterable[Tensor], copies: Sequence[tuple[int, int]]) -> None:
    """Copy whole KV blocks of each layer (P, S, X), from the first of each pair to the second."""
    if copies:
        source_C, destination_C = torch.tensor(copies).T
        for blocks_PSX in layers:
            source, destination = source_C.to(blocks_PSX.device), destination_C.to(blocks_PSX.device)
            blocks_PSX.index_copy_(0, destination, blocks_PSX[source])
