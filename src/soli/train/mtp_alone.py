"""MTP modules trained alone, for a model that has none or whose own fell behind it (`losses.mtp_alone`).

The model stays as it is, and its modules learn to predict what it predicts itself: module d takes the model's hidden
state at position i, and its distribution is drawn to the one that the model has at i + 1 + d, where it has seen the
tokens between. A draft is accepted where the two agree (section 5.4.3), so that is what is trained, instead of the text
(eq. 24): the divergence KL(model || module), a mean over positions, in nats. No gradient goes to the model,
nor to the embedding and the head, which the modules share with it.

Shapes: B sequences, T tokens, D hidden, V vocabulary, W = T + 1 + MTP depth (a window).
"""

from typing import Any

import torch
from torch import Tensor

from soli.model.transformer import Transformer
from soli.train.losses import (
    Losses,
    StepTotals,
    add_routing_losses,
    chunk_size,
    input_length,
    mtp_losses,
    next_token_loss,
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
    hidden_BTD, head_VD = whole_BTD[:, :length], model.lm_head.weight.detach()
    with torch.no_grad():
        next_token = next_token_loss(hidden_BTD, head_VD, window_BW, totals)

    def diverge(depth: int, hidden_BTD: Tensor, weight_BT: Tensor) -> Tensor:
        return divergence(hidden_BTD, whole_BTD[:, 1 + depth : 1 + depth + length], head_VD, weight_BT)

    mtp, routing = mtp_losses(model, hidden_BTD, window_BW, totals, eos_id, diverge)
    return add_routing_losses(next_token, mtp, routing, window_BW, totals)


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
