"""AdamW with moments kept in bfloat16, as the paper trains (section 3.3.1); weights and gradients stay fp32.

A moment is widened, moved and used in fp32, and rounded to nearest even only when it is put back: a step's own gradient
acts unrounded. The second moment moves by 1 - beta2 of its distance, so beta2 must stay well below 1 - 2^-8: at the
paper's 0.95 a moment forgets far faster than bfloat16 rounds; at 0.999 it could stand still.
"""

from __future__ import annotations

from typing import Any

import torch


class AdamW(torch.optim.Optimizer):
    """Loshchilov and Hutter's update, decay decoupled; the same state names as torch's own."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)

    def _move(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
        state["step"] += 1
        count = int(state["step"])
        mean = state["exp_avg"].to(p.dtype).lerp_(p.grad, 1 - beta1)
        square = state["exp_avg_sq"].to(p.dtype).mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        size = square.div_(1 - beta2**count).sqrt_().add_(group["eps"])
        p.addcdiv_(mean, size, value=-group["lr"] / (1 - beta1**count))
