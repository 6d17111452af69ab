"""MTP modules trained alone, for a model that has none or whose own fell behind it (`losses.mtp_alone`).

The model stays as it is, and its modules learn to predict what it predicts itself: module d takes the model's hidden
state at position i, and its distribution is drawn to the one that the model has at i + 1 + d, where it has seen the
tokens between. A draft is accepted where the two agree (section 5.4.3), so that is what is trained, instead of the text
(eq. 24): the divergence KL(model || module), a mean over positions, in nats. There is no gradient to the model,
and none through the embedding and the head, which the modules share with it.

Shapes: B sequences, T tokens, D hidden, V vocabulary, W = T + 1 + MTP depth (a window).
"""

from typing import Any

import torch
from torch import Tensor

from soli.model.router import Routing
from soli.model.transformer import Transformer
from soli.train.losses import (
    Losses,
    StepTotals,
    add_balance,
    chunk_size,
    cross_entropy,
    input_length,
    mtp_mask,
)


def freeze_all_but_mtp(model: Transformer) -> None:
    """Take the gradient from every parameter but those of the MTP modules. Before the model is sharded."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("mtp."))


def compute_draft_losses(model: Transformer, window_BW: Tensor, totals: StepTotals, eos_id: int) -> Losses:
    """As `losses.compute_losses`, but `mtp` is the divergence from the model, and `balance` and `counts_LE` are of the
    modules' layers alone. `next_token` is the model's loss, without gradient."""
    depths, length = len(totals.mtp_tokens), input_length(window_BW, totals)
    whole_BTD = model.backbone(window_BW[:, : length + depths]).hidden_BTD.detach()  # the last module's target is last
    head_VD = model.lm_head.weight.detach()
    hidden_BTD = whole_BTD[:, :length]
    weight_BT = torch.full(window_BW[:, :length].shape, 1 / totals.tokens, device=window_BW.device)
    with torch.no_grad():
        next_token = cross_entropy(hidden_BTD, head_VD, window_BW[:, 1 : 1 + length], weight_BT)
    routing: list[Routing] = []
    mtp = []
    for depth in range(depths):
        step = model.mtp_step(depth, hidden_BTD, window_BW[:, 1 + depth : 1 + depth + length])
        weight_BT = mtp_mask(window_BW, depth, length, eos_id) / totals.mtp_tokens[depth]
        target_BTD = whole_BTD[:, 1 + depth : 1 + depth + length]
        mtp.append(divergence(step.hidden_BTD, target_BTD, head_VD, weight_BT))
        routing += step.routing
        hidden_BTD = step.hidden_BTD
    zero = torch.zeros((), device=window_BW.device)
    balance = add_balance(zero, routing, window_BW.shape[0]) / totals.sequences
    counts = [layer.counts_E() for layer in routing]
    counts_LE = torch.stack(counts) if counts else torch.zeros(0, 0, dtype=torch.int64)
    return Losses(next_token, tuple(mtp), balance, counts_LE)


def divergence(hidden_BTD: Tensor, target_BTD: Tensor, head_VD: Tensor, weight_BT: Tensor) -> Tensor:
    """Sum over tokens of weight * KL(softmax(target @ head^T) || softmax(hidden @ head^T)), in nats (0-d fp32).

    Differentiable in `hidden` only; the gradient is computed here, a chunk of logits at a time.
    """
    return _LinearDivergence.apply(
        hidden_BTD.flatten(0, -2), target_BTD.flatten(0, -2), head_VD, weight_BT.flatten().float()
    )


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, target_TD: Tensor, head_VD: Tensor, w_T: Tensor) -> Tensor:
        weight_VD = head_VD.to(hidden_TD.dtype)
        grad_h = torch.empty_like(hidden_TD)
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        chunk = chunk_size(head_VD)
        for start in range(0, hidden_TD.shape[0], chunk):
            part = slice(start, start + chunk)
            w = w_T[part, None]
            logp = torch.log_softmax((target_TD[part] @ weight_VD.t()).float(), dim=-1)
            logq = torch.log_softmax((hidden_TD[part] @ weight_VD.t()).float(), dim=-1)
            p = logp.exp()
            total += (p * (logp - logq) * w).sum()
            grad_h[part] = (logq.exp_().sub_(p).mul_(w)).to(hidden_TD.dtype) @ weight_VD
        ctx.save_for_backward(grad_h)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_h,) = ctx.saved_tensors
        return grad_h * grad.to(grad_h.dtype), None, None, None
