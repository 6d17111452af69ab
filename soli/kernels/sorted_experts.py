"""The experts of a layer in one call: tokens sorted by expert, one product per expert that was chosen, nothing else.

Shapes: T tokens, D hidden, E experts, F expert width, K chosen, P = T*K pairs of token and expert.

No token is dropped and no expert is computed for a token that did not choose it; an expert without tokens costs nothing
and gets a zero gradient. On a GPU in bfloat16 the products of all experts are one grouped call; elsewhere they are one
call per expert on a slice. The sum over a token's experts runs in a fixed order, so the result is deterministic.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def experts(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Equation 12's routed part for T tokens: (T, D), (T, K), (T, K) to (T, D) in the dtype of x."""
    T, K = expert_ids_TK.shape
    order_P = expert_ids_TK.flatten().argsort(stable=True)
    counts_E = torch.bincount(expert_ids_TK.flatten(), minlength=gate_up_E2FD.shape[0])
    x_PD = x_TD.index_select(0, order_P // K)
    y_PD = _mlp_by_expert(x_PD, counts_E, gate_up_E2FD.to(x_TD.dtype), down_EDF.to(x_TD.dtype))
    place_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(T * K, device=order_P.device))
    y_TKD = y_PD.index_select(0, place_P).unflatten(0, (T, K))
    return (y_TKD * weights_TK[..., None]).sum(dim=1).to(x_TD.dtype)


def _mlp_by_expert(x_PD: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """The gated MLP of each expert on its own run of rows; rows are sorted by expert."""
    if x_PD.is_cuda and x_PD.dtype == torch.bfloat16:
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gate_PF, up_PF = F.grouped_mm(x_PD, gate_up_E2FD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate_PF) * up_PF, down_EDF.transpose(1, 2), offs=ends_E)
    parts = []
    # unbind, not [e]: its backward stacks the experts' gradients once instead of adding E full-size tensors.
    runs = zip(x_PD.split(counts_E.tolist()), gate_up_E2FD.unbind(0), down_EDF.unbind(0), strict=True)
    for rows, gate_up, down in runs:
        if rows.shape[0]:
            gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate) * up, down))
    return torch.cat(parts) if parts else x_PD
