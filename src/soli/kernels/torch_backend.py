"""The seam in plain torch, on any device and with gradients: what computes where no other backend does.

Experts: tokens are sorted by expert, one product per selected expert, nothing else. No token is dropped, and an expert
without tokens costs nothing and gets a zero gradient. In bfloat16 the products of all experts are one grouped call;
elsewhere they are one call per expert on its slice. The sum over a token's experts runs in a fixed order, so the result
is deterministic.

Quantized weights: a matrix is dequantized in the dtype of the input just before its product and freed after it, so
memory holds one matrix beside the quantized ones. No gradient reaches a quantized weight.

Shapes: T tokens, D hidden, E experts, F expert width, K selected, P = T*K pairs of token and expert; in latent_decode
as in reference.py, with L the slots of the longest table.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from soli.formats.quantized import QuantizedWeight
from soli.kernels.backend import Backend, QuantizedExperts

# oneDNN compiles its bfloat16 product anew for every number of rows. Long runs are padded to a multiple, so that a few
# shapes serve all: 2.5 times faster in training, where no two steps route alike. Short runs, as in decoding, are not.
RUN_ROWS: Final = 64


class TorchBackend(Backend):
    """Also the base of backends that have some of the operations only."""

    def supports(self, x: Tensor, weight: Tensor) -> bool:
        return True

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return multiply(x, weight, bias)

    def experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        def run(x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor) -> Tensor:
            return _mlps(x_PD, weights_P1, counts_E, gate_up_E2FD.to(x_PD.dtype), down_EDF.to(x_PD.dtype))

        long_runs = expert_ids_TK.numel() >= RUN_ROWS * gate_up_E2FD.shape[0]
        padded = x_TD.dtype == torch.bfloat16 and x_TD.device.type == "cpu" and long_runs
        multiple = RUN_ROWS if padded else 1
        return dispatch_and_combine(x_TD, expert_ids_TK, weights_TK, gate_up_E2FD.shape[0], run, multiple)

    def quantized_linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        return multiply(x, weight.dequantize(x.dtype), bias)

    def quantized_experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, experts: QuantizedExperts
    ) -> Tensor:
        def mlp(
            x: Tensor, weights: Tensor, gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight
        ) -> Tensor:
            hidden = F.silu(multiply(x, gate.dequantize(x.dtype))) * multiply(x, up.dequantize(x.dtype)) * weights
            return multiply(hidden, down.dequantize(x.dtype))

        def run(x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor) -> Tensor:
            return by_expert(mlp, x_PD, weights_P1, counts_E, experts.gates, experts.ups, experts.downs)

        return dispatch_and_combine(x_TD, expert_ids_TK, weights_TK, len(experts.gates), run)

    def latent_decode(
        self, q_BHX: Tensor, blocks_PSX: Tensor, table_BM: Tensor, lengths_B: Tensor, *, latent: int, scale: float
    ) -> Tensor:
        """All rows at once: every row's blocks are gathered, and what is past its end masked. Softmax in float32."""
        slots_BLX = blocks_PSX[table_BM.long()].flatten(1, 2)
        past_BL = torch.arange(slots_BLX.shape[1], device=q_BHX.device) >= lengths_B[:, None]
        # What is stored past the end may be stale: its probability is 0, but 0 x NaN would still poison the sum.
        slots_BLX = slots_BLX.masked_fill_(past_BL[..., None], 0.0)
        scores_BHL = (q_BHX * scale) @ slots_BLX.transpose(1, 2)
        scores_BHL = scores_BHL.masked_fill(past_BL[:, None], float("-inf"))
        # torch's softmax is float32 inside whatever the dtype.
        return scores_BHL.softmax(dim=-1) @ slots_BLX[..., :latent]


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed; a weight of higher precision (a float32 master) is rounded."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if needs_float32(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def needs_float32(x: Tensor) -> bool:
    """Whether `x` is better multiplied as float32: bfloat16 where torch has no products of it, and no gradient is
    recorded, which would keep the copies."""
    return x.dtype == torch.bfloat16 and x.is_cpu and not torch.is_grad_enabled() and not has_bfloat16_products()


@cache
def has_bfloat16_products() -> bool:
    """Whether torch multiplies bfloat16 on this processor at more than float32's speed, by oneDNN.

    Measured beside torch 2.13 on AVX2: 512 x 2,048 by 4,096 takes 254 ms in bfloat16 and 67 in float32.
    """
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("architecture") != "x86_64" or bool(capabilities.get("avx512_f"))


def count_tokens(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Tokens per expert, int64 (E,). Not bincount: a GPU would have to synchronise for the length of its result."""
    ids_P = expert_ids_TK.flatten()
    return ids_P.new_zeros(num_experts).scatter_add_(0, ids_P, torch.ones_like(ids_P))


def dispatch_and_combine(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    multiple: int = 1,
) -> Tensor:
    """Send tokens to their experts, whatever network those are, and sum the results: (T, D).

    ``run(x_PD, weights_P1, counts_E)`` gets the rows sorted by expert, the gate weight of each row, and how many rows
    each expert has; it returns each row's output times its weight. Each expert's rows are padded to a ``multiple`` with
    copies of token 0 at weight 0; their outputs are not used, so they take no part in any gradient.
    """
    T, K = expert_ids_TK.shape
    order_P = expert_ids_TK.flatten().argsort(stable=True)
    counts_E = count_tokens(expert_ids_TK, num_experts)
    row_P = torch.arange(T * K, device=order_P.device)
    token_P = order_P // K
    weights_P = weights_TK.flatten().index_select(0, order_P)
    if multiple > 1:
        padded_E = (counts_E + multiple - 1) // multiple * multiple
        shift_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)
        row_P = row_P + shift_E.repeat_interleave(counts_E)
        rows = int(padded_E.sum())
        token_P = token_P.new_zeros(rows).index_copy(0, row_P, token_P)
        weights_P = weights_P.new_zeros(rows).index_copy(0, row_P, weights_P)
        counts_E = padded_E
    y_PD = run(x_TD.index_select(0, token_P), weights_P[:, None].to(x_TD.dtype), counts_E)
    row_of_pair_P = torch.empty_like(order_P).scatter_(0, order_P, row_P)
    return y_PD.index_select(0, row_of_pair_P).unflatten(0, (T, K)).sum(dim=1)


def by_expert(
    mlp: Callable[..., Tensor], x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor, *matrices: Sequence[Any]
) -> Tensor:
    """``mlp(rows, weights, *matrices of the expert)`` of each expert on its own run of rows, sorted by expert."""
    counts = counts_E.tolist()
    runs = enumerate(zip(x_PD.split(counts), weights_P1.split(counts), strict=True))
    # Only the matrices of experts with rows are taken, in ascending order: they may have to be read from disk.
    parts = [mlp(rows, weights, *(own[e] for own in matrices)) for e, (rows, weights) in runs if rows.shape[0]]
    return torch.cat(parts) if parts else x_PD


def _mlps(x_PD: Tensor, weights_P1: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """The gated MLP of each expert on its own run of rows, sorted by expert, each row times its gate weight.

    The weight multiplies the hidden layer, F wide, instead of the output, D wide: the same number for less work.
    """
    if _can_group(x_PD, down_EDF):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        gate_PF, up_PF = F.grouped_mm(x_PD, gate_up_E2FD.transpose(1, 2), offs=offsets_E).chunk(2, dim=-1)
        hidden_PF = F.silu(gate_PF) * up_PF * weights_P1
        return F.grouped_mm(hidden_PF, down_EDF.transpose(1, 2), offs=offsets_E)

    def mlp(rows: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up * weights, down)

    # unbind, not [e]: its backward stacks the experts' gradients once instead of adding E full-size tensors.
    return by_expert(mlp, x_PD, weights_P1, counts_E, gate_up_E2FD.unbind(0), down_EDF.unbind(0))


def _can_group(x_PD: Tensor, down_EDF: Tensor) -> bool:
    """torch's grouped product takes bfloat16 with rows of a multiple of 16 bytes; on a GPU, from capability 8."""
    fits = x_PD.dtype == torch.bfloat16 and x_PD.shape[0] > 0 and x_PD.shape[1] % 8 == 0 and down_EDF.shape[2] % 8 == 0
    return fits and (not x_PD.is_cuda or torch.cuda.get_device_capability(x_PD.device)[0] >= 8)
