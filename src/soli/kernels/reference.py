"""The oracle of the seam: each operation by its definition, in plain torch. Slow on purpose; every backend equals it.

Shapes: T tokens, D hidden, E experts, F expert width, K selected; B rows, H heads, P blocks of S slots, M blocks of a
row, X = C latent + R rotary width.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from soli.kernels.torch_backend import TorchBackend


class ReferenceBackend(TorchBackend):
    """Quantized weights are dequantized and multiplied as in `TorchBackend`."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) times weight (out, in) transposed, in the dtype of x."""
        y = x @ weight.to(x.dtype).T
        return y if bias is None else y + bias.to(x.dtype)

    def experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """Token by token and expert by expert: y_t = sum_k w_tk * down_e(silu(gate_e x_t) * up_e x_t), equation 12."""
        rows = []
        for x_D, ids_K, weights_K in zip(x_TD, expert_ids_TK.tolist(), weights_TK, strict=True):
            y_D = torch.zeros_like(x_D, dtype=weights_TK.dtype)
            for e, w in zip(ids_K, weights_K, strict=True):
                gate_F, up_F = self.linear(x_D, gate_up_E2FD[e]).chunk(2)
                y_D = y_D + w * self.linear(F.silu(gate_F) * up_F, down_EDF[e])
            rows.append(y_D)
        return torch.stack(rows).to(x_TD.dtype) if rows else x_TD.clone()

    def latent_decode(
        self, q_BHX: Tensor, blocks_PSX: Tensor, table_BM: Tensor, lengths_B: Tensor, *, latent: int, scale: float
    ) -> Tensor:
        """Row by row: softmax(scale * q k) over the row's first slots, times their latents, the first C = `latent`
        values of each slot: (B, H, C) in the dtype of q. Slot s of row b is slot s % S of block table[b, s // S].
        Softmax in float32."""
        S = blocks_PSX.shape[1]
        rows = []
        for q_HX, table_M, length in zip(q_BHX, table_BM, lengths_B.tolist(), strict=True):
            slots_LX = blocks_PSX[table_M[: -(-length // S)].long()].flatten(0, 1)[:length]
            shares_HL = ((q_HX @ slots_LX.T).float() * scale).softmax(dim=-1)
            rows.append(shares_HL.to(q_HX.dtype) @ slots_LX[:, :latent])
        return torch.stack(rows) if rows else q_BHX[..., :latent]


REFERENCE: Final = ReferenceBackend()
