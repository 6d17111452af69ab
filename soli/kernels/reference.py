"""The oracle of both seams, in the plainest torch that says what is meant. Slow on purpose; every fast path equals it.

Shapes: T tokens, D hidden, E experts, F expert width, K chosen.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, in the dtype of x."""
    y = x @ weight.to(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def experts(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Token by token and expert by expert: y_t = sum_k w_tk * down_e(silu(gate_e x_t) * up_e x_t), equation 12."""
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, expert_ids_TK.tolist(), weights_TK, strict=True):
        y_D = torch.zeros_like(x_D, dtype=weights_TK.dtype)
        for e, w in zip(ids_K, weights_K, strict=True):
            gate_F, up_F = linear(x_D, gate_up_E2FD[e]).chunk(2)
            y_D = y_D + w * linear(F.silu(gate_F) * up_F, down_EDF[e])
        rows.append(y_D)
    return torch.stack(rows).to(x_TD.dtype) if rows else x_TD.clone()
