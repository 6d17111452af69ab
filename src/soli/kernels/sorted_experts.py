"""The experts of a layer in one call: tokens sorted by expert, one product per expert that was chosen, nothing else.

Shapes: T tokens, D hidden, E experts, F expert width, K chosen, P = T*K pairs of token and expert.

No token is dropped and no expert is computed for a token that did not choose it; an expert without tokens costs nothing
and gets a zero gradient. In bfloat16 the products of all experts are one grouped call; elsewhere they are one call per
expert on its slice. The sum over a token's experts runs in a fixed order, so the result is deterministic.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# oneDNN compiles its bfloat16 product anew for every number of rows it meets. Long runs are padded to a multiple, so
# that a few shapes serve all: 2.5 times faster in training, where no two steps route alike. Short runs, as in
# decoding, stay as they are.
RUN_ROWS = 64


def experts(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Equation 12's routed part for T tokens: (T, D), (T, K), (T, K) to (T, D) in the dtype of x."""

    def run(x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor) -> Tensor:
        return _mlp_by_expert(x_PD, weights_P1, counts_E, gate_up_E2FD.to(x_PD.dtype), down_EDF.to(x_PD.dtype))

    long_runs = expert_ids_TK.numel() >= RUN_ROWS * gate_up_E2FD.shape[0]
    padded = x_TD.dtype == torch.bfloat16 and x_TD.device.type == "cpu" and long_runs
    return dispatch(x_TD, expert_ids_TK, weights_TK, gate_up_E2FD.shape[0], run, RUN_ROWS if padded else 1)


def count_tokens(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Tokens per expert, int64 (E,). Not bincount: a GPU would have to stop and tell how long its answer is."""
    ids_P = expert_ids_TK.flatten()
    return ids_P.new_zeros(num_experts).scatter_add_(0, ids_P, torch.ones_like(ids_P))


def dispatch(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    multiple: int = 1,
) -> Tensor:
    """Send tokens to their experts, whatever network those are, and sum what comes back.

    ``run(x_PD, weights_P1, counts_E)`` gets the rows sorted by expert, the gate weight of each row, and how many rows
    each expert has; it returns each row's output times its weight. Each expert's rows are filled up to a ``multiple``
    with copies of token 0 at weight 0; nobody reads what becomes of them, so they take no part in any gradient.
    """
    T, K = expert_ids_TK.shape
    order_P = expert_ids_TK.flatten().argsort(stable=True)
    counts_E = count_tokens(expert_ids_TK, num_experts)
    row_P, token_P = torch.arange(T * K, device=order_P.device), order_P // K
    weights_P = weights_TK.flatten().index_select(0, order_P)
    if multiple > 1:
        filled_E = (counts_E + multiple - 1) // multiple * multiple
        shift_E = (filled_E - counts_E).cumsum(0) - (filled_E - counts_E)
        row_P = row_P + shift_E.repeat_interleave(counts_E)
        rows = int(filled_E.sum())
        token_P = token_P.new_zeros(rows).index_copy(0, row_P, token_P)
        weights_P = weights_P.new_zeros(rows).index_copy(0, row_P, weights_P)
        counts_E = filled_E
    y_PD = run(x_TD.index_select(0, token_P), weights_P[:, None].to(x_TD.dtype), counts_E)
    place_P = torch.empty_like(order_P).scatter_(0, order_P, row_P)
    return y_PD.index_select(0, place_P).unflatten(0, (T, K)).sum(dim=1)


def _mlp_by_expert(
    x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The gated MLP of each expert on its own run of rows, sorted by expert, each row times its gate weight.

    The weight multiplies the hidden layer, F wide, instead of the output, D wide: the same number for less work.
    """
    if _can_group(x_PD, down_EDF):
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gate_PF, up_PF = F.grouped_mm(x_PD, gate_up_E2FD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        hidden_PF = F.silu(gate_PF) * up_PF * weights_P1
        return F.grouped_mm(hidden_PF, down_EDF.transpose(1, 2), offs=ends_E)
    counts = counts_E.tolist()
    parts = []
    # unbind, not [e]: its backward stacks the experts' gradients once instead of adding E full-size tensors.
    runs = zip(x_PD.split(counts), weights_P1.split(counts), gate_up_E2FD.unbind(0), down_EDF.unbind(0), strict=True)
    for rows, weights, gate_up, down in runs:
        if rows.shape[0]:
            gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate) * up * weights, down))
    return torch.cat(parts) if parts else x_PD


def _can_group(x_PD: Tensor, down_EDF: Tensor) -> bool:
    """torch's grouped product takes bfloat16 with rows of a multiple of 16 bytes; on a GPU, from capability 8."""
    fits = x_PD.dtype == torch.bfloat16 and x_PD.shape[0] > 0 and x_PD.shape[1] % 8 == 0 and down_EDF.shape[2] % 8 == 0
    return fits and (not x_PD.is_cuda or torch.cuda.get_device_capability(x_PD.device)[0] >= 8)
