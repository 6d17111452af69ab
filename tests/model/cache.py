"""The smallest cache that keeps the model's promise: slots in order of position, for rows that advance together."""

import torch
from torch import Tensor


class GrowingCache:
    def __init__(self) -> None:
        self.slots: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, latent_BTC: Tensor, rope_BTR: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.slots:
            latent, rope = self.slots[layer]
            assert int(positions_BT[0, 0]) == latent.shape[1]
            latent_BTC, rope_BTR = torch.cat((latent, latent_BTC), 1), torch.cat((rope, rope_BTR), 1)
        self.slots[layer] = (latent_BTC, rope_BTR)
        return self.slots[layer]
