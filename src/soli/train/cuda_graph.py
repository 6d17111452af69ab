"""Forward and backward of a step as one CUDA graph: what a small model waits for on a GPU is its thousand launches.

A batch that comes a second time in the same shape is captured, later ones are replayed; in between, shapes are new and
steps run as they are written, as every step of a ramp does. The same kernels run on the same numbers. Weights and
biases are read where they lie, so a replay sees every step of the optimizer; what else varies, the window, lambda and
the number of MTP targets, lies in tensors that are filled anew.

Shapes: B sequences, W tokens of a window, L MoE layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soli.model.transformer import Transformer
from soli.train.losses import StepTotals, compute_losses

WARM_UP = 2  # passes before the capture: libraries choose their kernels and Triton compiles


class GraphedStep:
    """Losses, counts and gradients of a step that is one micro-batch, as `loop.accumulate` wants them."""

    def __init__(self, model: Transformer, alpha: float, eos_id: int) -> None:
        self.model, self.alpha, self.eos_id = model, alpha, eos_id
        self.seen: object = None
        self.captured: _Captured | None = None

    def __call__(self, window_BW: Tensor, totals: StepTotals, weight: float) -> tuple[Tensor, Tensor] | None:
        """Next-token, MTP and balance loss (3,) and the counts (L, E), gradients set; None for a shape that is new."""
        shape = (window_BW.shape, self.model.config)
        if self.seen != shape:
            self.seen, self.captured = shape, None
            return None
        if self.captured is None:
            self.captured = _Captured(self.model, window_BW, totals, self.alpha, self.eos_id)
        return self.captured.replay(window_BW, totals, weight)


class _Captured:
    """One shape's graph, with the tensors that it reads and writes."""

    def __init__(self, model: Transformer, window_BW: Tensor, totals: StepTotals, alpha: float, eos_id: int) -> None:
        device = model.embed_tokens.weight.device
        self.model, self.alpha, self.eos_id = model, alpha, eos_id
        self.window_BW = window_BW.to(device, copy=True)
        self.weight = torch.zeros((), device=device)
        self.mtp_tokens = [torch.ones((), device=device) for _ in totals.mtp_tokens]
        self.totals = StepTotals(totals.tokens, tuple(self.mtp_tokens), totals.sequences)
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._pass()
        torch.cuda.current_stream(device).wait_stream(aside)
        model.zero_grad(set_to_none=True)  # so that the captured backward pass makes gradients and adds to none
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # another thread may be saving
            self.losses, self.counts_LE = self._pass()
        self.gradients = [(p, p.grad) for p in model.parameters()]

    def _pass(self) -> tuple[Tensor, Tensor]:
        losses = compute_losses(self.model, self.window_BW, self.totals, self.eos_id)
        losses.total(self.weight, self.alpha).backward()
        return losses.parts(), losses.counts_LE

    def replay(self, window_BW: Tensor, totals: StepTotals, weight: float) -> tuple[Tensor, Tensor]:
        self.window_BW.copy_(window_BW)
        self.weight.fill_(weight)
        for held, tokens in zip(self.mtp_tokens, totals.mtp_tokens, strict=True):
            held.fill_(float(tokens))
        self.graph.replay()
        for p, gradient in self.gradients:
            p.grad = gradient
        return self.losses, self.counts_LE.clone()
