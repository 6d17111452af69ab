"""Forward and backward of a step as one CUDA graph: on a GPU a small model's time goes into its thousand launches.

A batch whose shape occurs a second time in a row is captured, later ones are replayed; before that steps run eagerly,
as every step of a batch ramp does. The same kernels run on the same numbers. Weights and biases are read in place, so a
replay sees every step of the optimizer; what else varies, the window, lambda and the number of MTP targets, is copied
into tensors of the graph.

Shapes: B sequences, W tokens of a window, L MoE layers, E experts.
"""

import torch
from torch import Tensor

from soli.model.transformer import Transformer
from soli.train.losses import StepTotals, compute_losses

WARM_UP = 2  # steps before the capture, in which libraries choose their kernels and Triton compiles


class GraphedStep:
    """Losses, counts and gradients of a step that is one micro-batch, as `trainer.accumulate` returns them."""

    def __init__(self, model: Transformer, alpha: float, eos_id: int) -> None:
        self.model, self.alpha, self.eos_id = model, alpha, eos_id
        self.last_shape: object = None
        self.graph: _CapturedGraph | None = None

    def __call__(self, window_BW: Tensor, totals: StepTotals, weight: float) -> tuple[Tensor, Tensor] | None:
        """Next-token, MTP and balance loss (3,) and the counts (L, E), gradients set; None for a new shape."""
        shape = (window_BW.shape, len(totals.mtp_tokens), self.model.config)
        if self.last_shape != shape:
            self.last_shape = shape
            self.graph = None
            return None
        if self.graph is None:
            self.graph = _CapturedGraph(self.model, window_BW, totals, self.alpha, self.eos_id)
        return self.graph.replay(window_BW, totals, weight)


class _CapturedGraph:
    """The graph of one shape, with the tensors that it reads and writes."""

    def __init__(self, model: Transformer, window_BW: Tensor, totals: StepTotals, alpha: float, eos_id: int) -> None:
        device = model.embed_tokens.weight.device
        self.model, self.alpha, self.eos_id = model, alpha, eos_id
        self.window_BW = window_BW.to(device, copy=True)
        self.weight = torch.zeros((), device=device)
        self.mtp_tokens = [torch.ones((), device=device) for _ in totals.mtp_tokens]
        self.totals = StepTotals(totals.tokens, tuple(self.mtp_tokens), totals.sequences)
        warm_up_stream = torch.cuda.Stream(device)
        warm_up_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(warm_up_stream):
            for _ in range(WARM_UP):
                self._forward_backward()
        torch.cuda.current_stream(device).wait_stream(warm_up_stream)
        model.zero_grad(set_to_none=True)  # so that the captured backward pass allocates gradients and adds to none
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # another thread may be saving
            self.losses, self.counts_LE = self._forward_backward()
        self.gradients = [(p, p.grad) for p in model.parameters()]

    def _forward_backward(self) -> tuple[Tensor, Tensor]:
        losses = compute_losses(self.model, self.window_BW, self.totals, self.eos_id)
        losses.total(self.weight, self.alpha).backward()
        return losses.parts(), losses.counts_LE

    def replay(self, window_BW: Tensor, totals: StepTotals, weight: float) -> tuple[Tensor, Tensor]:
        self.window_BW.copy_(window_BW)
        self.weight.fill_(weight)
        for buffer, tokens in zip(self.mtp_tokens, totals.mtp_tokens, strict=True):
            buffer.fill_(float(tokens))
        self.graph.replay()
        for p, gradient in self.gradients:
            p.grad = gradient
        return self.losses, self.counts_LE.clone()
