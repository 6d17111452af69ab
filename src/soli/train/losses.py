"""The three losses: next token, multi-token prediction (eqs. 24-25), sequence-wise balance (eqs. 17-20).

Each is a sum over this micro-batch divided by a count over the whole optimizer step, so that gradients do not depend on
how the step is split (trap 8). Cross entropy is computed in fp32 from logits in the model's dtype, a chunk of tokens at
a time; its gradient is computed together with it, so at most one chunk of logits exists.

Shapes: B sequences, T tokens, D hidden, V vocabulary, E experts, K selected, W = T + 1 + MTP depth (a window).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soli.model.router import Routing
from soli.model.transformer import Transformer
from soli.parallel.ranks import ALONE, Ranks

CHUNK = 512  # tokens: fp32 logits of a 6 k vocabulary then fit in a CPU's cache; larger is slower
GPU_LOGITS = 2**27  # on a GPU a chunk has this many fp32 logits (0.5 GiB): smaller ones would not occupy it


@dataclass(frozen=True)
class StepTotals:
    """Counts over one whole optimizer step, all micro-batches and ranks, that the sums are divided by."""

    tokens: int
    mtp_tokens: tuple[int | Tensor, ...]  # unmasked targets per depth, at least 1
    sequences: int


@dataclass(frozen=True)
class Losses:
    """One micro-batch's share of each loss, as 0-d fp32 tensors; shares of a step add up to its means."""

    next_token: Tensor  # nats per token
    mtp: tuple[Tensor, ...]  # nats per unmasked target, one per depth
    balance: Tensor  # summed over MoE layers, before alpha
    counts_LE: Tensor  # tokens per expert (int64), L MoE layers, those of the computed MTP modules last

    def total(self, mtp_weight: float | Tensor, alpha: float) -> Tensor:
        """next token + lambda * mean over depths + alpha * balance (eqs. 25 and 17)."""
        loss = self.next_token + alpha * self.balance
        return loss + mtp_weight * torch.stack(self.mtp).mean() if self.mtp else loss

    def parts(self) -> Tensor:
        """Next token, mean over MTP depths (0 without any), balance: (3,), detached, for the report."""
        mtp = torch.stack(self.mtp).mean() if self.mtp else torch.zeros_like(self.next_token)
        return torch.stack((self.next_token, mtp, self.balance)).detach()


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_t w_t * -log softmax(hidden_t @ head^T)[target_t], and its gradients, a chunk of logits at a time."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, w_T: Tensor) -> Tensor:
        weight_VD = head_VD.to(hidden_TD.dtype)
        grad_h = torch.empty_like(hidden_TD)
        grad_w = torch.zeros_like(head_VD, dtype=torch.float32)
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        chunk = chunk_size(head_VD)
        for start in range(0, hidden_TD.shape[0], chunk):
            part = slice(start, start + chunk)
            h, target, w = hidden_TD[part], target_T[part, None], w_T[part, None]
            logp = torch.log_softmax((h @ weight_VD.t()).float(), dim=-1)
            total -= (logp.gather(1, target) * w).sum()
            grad = logp.exp_().scatter_add_(1, target, -torch.ones_like(w)).mul_(w).to(h.dtype)  # d loss / d logits
            grad_h[part] = grad @ weight_VD
            grad_w += grad.t() @ h
        ctx.save_for_backward(grad_h, grad_w.to(head_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad.to(grad_h.dtype), grad_w * grad.to(grad_w.dtype), None, None


def chunk_size(head_VD: Tensor) -> int:
    """Tokens whose logits exist at one time."""
    return CHUNK if head_VD.device.type == "cpu" else max(CHUNK, GPU_LOGITS // head_VD.shape[0])


def cross_entropy(hidden_BTD: Tensor, head_VD: Tensor, target_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """Sum over tokens of weight * negative log likelihood (nats, fp32) of `target` under softmax(hidden @ head^T).

    With gradients enabled they are computed here, not in the backward pass. Differentiable in `hidden` and `head` only.
    """
    hidden_TD, target_T, weight_T = hidden_BTD.flatten(0, -2), target_BT.flatten(), weight_BT.flatten().float()
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden_TD, head_VD, target_T, weight_T)
    return (token_nll(hidden_BTD, head_VD, target_BT).flatten() * weight_T).sum()


@torch.no_grad()
def token_nll(hidden_BTD: Tensor, head_VD: Tensor, target_BT: Tensor) -> Tensor:
    """Negative log likelihood of each target in nats (fp32, BT), without gradient."""
    weight_VD = head_VD.to(hidden_BTD.dtype)
    chunk = chunk_size(head_VD)
    parts = []
    for h, target in zip(hidden_BTD.flatten(0, -2).split(chunk), target_BT.flatten().split(chunk), strict=True):
        logp = torch.log_softmax((h @ weight_VD.t()).float(), dim=-1)
        parts.append(-logp.gather(1, target[:, None])[:, 0])
    return torch.cat(parts).view(target_BT.shape)


def mtp_mask(window_BW: Tensor, depth: int, length: int, eos_id: int) -> Tensor:
    """Which of the `length` positions predict their target `depth + 2` tokens ahead inside one document (bool, BT).

    Position i, depth 0 first: the target is token i + 2 + depth; it is masked when any of tokens i + 1 .. i + 1 + depth
    ends the document, because the target then belongs to the next one (trap 9).
    """
    ends_BW = window_BW == eos_id
    crossed_BT = torch.zeros_like(ends_BW[:, :length])
    for ahead in range(1, depth + 2):
        crossed_BT |= ends_BW[:, ahead : ahead + length]
    return ~crossed_BT


def count_targets(window_BW: Tensor, mtp_depth: int, eos_id: int, ranks: Ranks = ALONE) -> StepTotals:
    """The denominators of an optimizer step; `window_BW` are its windows (W = T + 1 + mtp_depth) on this rank."""
    length = window_BW.shape[1] - 1 - mtp_depth
    targets = [int(mtp_mask(window_BW, depth, length, eos_id).sum()) for depth in range(mtp_depth)]
    sequences, *targets = ranks.sum(torch.tensor([window_BW.shape[0], *targets])).tolist()
    return StepTotals(sequences * length, tuple(max(1, count) for count in targets), sequences)


def sequence_balance(routing: Routing, sequences: int) -> Tensor:
    """Sum over sequences of sum_i f_i P_i (eqs. 17-20) for one MoE layer; 1 per sequence when load is even.

    f_i = E / (K T) times how often expert i is among the K largest *unbiased* scores of all experts, groups ignored
    (eq. 18, trap 7); P_i is the mean of s_i / sum_j s_j over the sequence. The gradient flows through P alone.
    """
    if not sequences:  # this rank has fewer than another
        return routing.scores_TE.sum()
    scores_BTE = routing.scores_TE.view(sequences, -1, routing.scores_TE.shape[-1])
    _, length, experts = scores_BTE.shape
    selected = routing.expert_ids_TK.shape[-1]
    top_BTK = scores_BTE.detach().topk(selected, dim=-1, sorted=False).indices
    count_BE = torch.zeros_like(scores_BTE[:, 0]).scatter_add_(
        1, top_BTK.flatten(1), torch.ones_like(top_BTK, dtype=scores_BTE.dtype).flatten(1)
    )
    mean_BE = (scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)).mean(dim=1)
    return (count_BE * mean_BE).sum() * (experts / (selected * length))


def add_balance(before: Tensor, routing: Sequence[Routing], sequences: int) -> Tensor:
    """`before` (0-d) and the balance loss of each of these layers, in order."""
    return sum((sequence_balance(layer, sequences) for layer in routing), before)


def compute_losses(model: Transformer, window_BW: Tensor, totals: StepTotals, eos_id: int) -> Losses:
    """Forward of one micro-batch: backbone once, MTP modules in sequence, every loss divided by the step's `totals`.

    As many MTP modules are computed as `totals` has depths.
    """
    backbone = model.backbone(window_BW[:, : input_length(window_BW, totals)])
    return finish_losses(model, backbone.hidden_BTD, backbone.routing, window_BW, totals, eos_id)


def input_length(window_BW: Tensor, totals: StepTotals) -> int:
    """Tokens of a window's input: all but the targets after it."""
    return window_BW.shape[1] - 1 - len(totals.mtp_tokens)


def finish_losses(
    model: Transformer,
    hidden_BTD: Tensor,
    backbone_routing: Sequence[Routing],
    window_BW: Tensor,
    totals: StepTotals,
    eos_id: int,
    balance_before: Tensor | None = None,
) -> Losses:
    """The losses from the backbone's normed hidden states on. `balance_before`: the sum of the balance losses of layers
    whose routing is not among `backbone_routing`, because another rank has them."""
    length = input_length(window_BW, totals)
    head_VD = model.lm_head.weight  # after the forward pass, which gathers it where it is in shards
    next_token = next_token_loss(hidden_BTD, head_VD, window_BW, totals)

    def predict(depth: int, hidden_BTD: Tensor, weight_BT: Tensor) -> Tensor:
        return cross_entropy(hidden_BTD, head_VD, window_BW[:, 2 + depth : 2 + depth + length], weight_BT)

    mtp, mtp_routing = mtp_losses(model, hidden_BTD, window_BW, totals, eos_id, predict)
    return add_routing_losses(next_token, mtp, [*backbone_routing, *mtp_routing], window_BW, totals, balance_before)


def next_token_loss(hidden_BTD: Tensor, head_VD: Tensor, window_BW: Tensor, totals: StepTotals) -> Tensor:
    """The micro-batch's share of the mean over the step's tokens, in nats."""
    target_BT = window_BW[:, 1 : 1 + input_length(window_BW, totals)]
    weight_BT = torch.full(target_BT.shape, 1 / totals.tokens, device=window_BW.device)
    return cross_entropy(hidden_BTD, head_VD, target_BT, weight_BT)


def mtp_losses(
    model: Transformer,
    hidden_BTD: Tensor,
    window_BW: Tensor,
    totals: StepTotals,
    eos_id: int,
    loss: Callable[[int, Tensor, Tensor], Tensor],
) -> tuple[tuple[Tensor, ...], list[Routing]]:
    """Run the MTP modules in sequence: `loss` of each, from its depth, its hidden states and the weight of each
    position (0 where the target is of another document), and the routing of their layers."""
    length = input_length(window_BW, totals)
    losses: list[Tensor] = []
    routing: list[Routing] = []
    for depth, targets in enumerate(totals.mtp_tokens):
        step = model.mtp_step(depth, hidden_BTD, window_BW[:, 1 + depth : 1 + depth + length])
        losses.append(loss(depth, step.hidden_BTD, mtp_mask(window_BW, depth, length, eos_id) / targets))
        routing += step.routing
        hidden_BTD = step.hidden_BTD
    return tuple(losses), routing


def add_routing_losses(
    next_token: Tensor,
    mtp: tuple[Tensor, ...],
    routing: Sequence[Routing],
    window_BW: Tensor,
    totals: StepTotals,
    balance_before: Tensor | None = None,
) -> Losses:
    """All losses of a micro-batch, with the balance loss and the counts of the layers whose `routing` this is."""
    before = torch.zeros((), device=window_BW.device) if balance_before is None else balance_before
    balance = add_balance(before, routing, window_BW.shape[0]) / totals.sequences
    counts = [layer.counts_E() for layer in routing]
    counts_LE = torch.stack(counts) if counts else torch.zeros(0, 0, dtype=torch.int64)
    return Losses(next_token, mtp, balance, counts_LE)


class StageLosses:
    """The losses of a step whose layers are on several ranks, as the task of a pipeline's stages.

    `sums_3` are next-token, MTP and balance loss of the micro-batches that this rank has finished, on the last stage;
    `counts_LE` tokens per expert of the MoE layers `names`, zero for those of other ranks.
    """

    def __init__(
        self, model: Transformer, totals: StepTotals, eos_id: int, weights: tuple[float, float], names: Sequence[str]
    ) -> None:
        """`weights`: lambda of multi-token prediction, alpha of the balance loss."""
        self.model, self.totals, self.eos_id = model, totals, eos_id
        self.mtp_weight, self.alpha = weights
        self.rows = {name: row for row, name in enumerate(names)}
        device = model.embed_tokens.weight.device
        self.sums_3 = torch.zeros(3, device=device)
        experts = model.config.n_routed_experts or 0
        self.counts_LE = torch.zeros(len(names), experts, dtype=torch.int64, device=device)

    def carry(self, routing: Mapping[str, Routing], carried: Tensor | None, sequences: int) -> Tensor | None:
        """The sum of the balance losses so far."""
        for name, decision in routing.items():
            self.counts_LE[self.rows[name]] += decision.counts_E()
        if carried is None and not routing:
            return None
        # A tensor of its own even where there is nothing to add: torch's schedules detach what a stage sent.
        before = torch.zeros((), device=self.sums_3.device) if carried is None else carried + 0
        return add_balance(before, list(routing.values()), sequences)

    def finish(
        self, hidden_BTD: Tensor, routing: Mapping[str, Routing], carried: Tensor | None, window_BW: Tensor
    ) -> Tensor:
        """The loss that gradients are of."""
        decisions = list(routing.values())
        losses = finish_losses(self.model, hidden_BTD, decisions, window_BW, self.totals, self.eos_id, carried)
        self.sums_3 += losses.parts()
        names = [*routing, *(name for name in self.rows if name.startswith("mtp."))]
        for name, counts_E in zip(names, losses.counts_LE, strict=True):
            self.counts_LE[self.rows[name]] += counts_E
        return losses.total(self.mtp_weight, self.alpha)
