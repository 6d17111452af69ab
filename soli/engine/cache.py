"""The latent cache of multi-head latent attention: what a token leaves behind for later tokens to attend to.

DeepSeek-V3 keeps, per token and layer, the compressed latent c_t^KV and the decoupled rotary key k_t^R (eqs. 1 and
3): kv_lora_rank + qk_rope_head_dim values instead of a key and a value per head. Slot s of a row holds position s,
always, so right-padded batches of different lengths need no page table: a pad's slot is overwritten when the row gets
there, and attention never looks past the query's position.

Shapes: B rows, T new tokens, C latent, R rope, S slots in use.
"""

import torch
from torch import Tensor

from soli.errors import SoliError

FIRST_SLOTS = 64


class LatentCache:
    """Per layer, a latent buffer and a rope buffer that grow by doubling up to `max_slots` positions.

    Layers, row count, dtype and device are taken from what is appended first; refuses positions at or past `max_slots`.
    """

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._last: tuple[Tensor, int] | None = None  # positions of the last append and their number of slots

    def append(self, layer: int, latent_BTC: Tensor, rope_BTR: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Writes T tokens of one layer at their positions; returns (B,S,C) and (B,S,R), S = highest position + 1."""
        slots = self._slots(positions_BT)
        if slots > self.max_slots:
            raise SoliError(
                f"position {slots - 1} is past the {self.max_slots} positions of this cache: use a shorter text"
            )
        latent_BSC, rope_BSR = self._grown(layer, latent_BTC, rope_BTR, slots)
        rows_B1 = torch.arange(latent_BTC.shape[0], device=latent_BTC.device)[:, None]
        latent_BSC[rows_B1, positions_BT] = latent_BTC
        rope_BSR[rows_B1, positions_BT] = rope_BTR
        return latent_BSC[:, :slots], rope_BSR[:, :slots]

    def keep(self, rows: Tensor) -> None:
        """Drops every batch row but `rows` (int64 indices, in the new order): finished requests leave the batch."""
        for layer, (latent_BSC, rope_BSR) in self._layers.items():
            self._layers[layer] = (latent_BSC.index_select(0, rows), rope_BSR.index_select(0, rows))

    def nbytes(self) -> int:
        """Bytes held by the buffers, unused slots included."""
        return sum(buffer.numel() * buffer.element_size() for pair in self._layers.values() for buffer in pair)

    def _slots(self, positions_BT: Tensor) -> int:
        """Highest position + 1. All layers of a pass give the same tensor, another pass a new one; so a GPU is asked,
        and waited for, once a pass."""
        if self._last is None or self._last[0] is not positions_BT:
            self._last = positions_BT, int(positions_BT.max()) + 1
        return self._last[1]

    def _grown(self, layer: int, latent_BTC: Tensor, rope_BTR: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        held = self._layers.get(layer)
        capacity = held[0].shape[1] if held else 0
        if held is None or capacity < slots:
            capacity = min(self.max_slots, max(slots, 2 * capacity, FIRST_SLOTS))
            old = held or (latent_BTC[:, :0], rope_BTR[:, :0])
            self._layers[layer] = (_widened(old[0], capacity), _widened(old[1], capacity))
        return self._layers[layer]


def _widened(buffer_BSX: Tensor, slots: int) -> Tensor:
    # Zeros, not empty: a masked slot has probability 0, and 0 x NaN from stale memory would still poison the sum.
    wider = buffer_BSX.new_zeros(buffer_BSX.shape[0], slots, buffer_BSX.shape[2])
    wider[:, : buffer_BSX.shape[1]] = buffer_BSX
    return wider
