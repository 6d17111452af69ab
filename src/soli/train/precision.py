"""FP8 training as in the paper (section 3.3): which modules multiply in E4M3, and which stay high."""

from __future__ import annotations

import torch

from soli.kernels.fp8 import cuda, emulation
from soli.model.layers import Linear
from soli.model.moe import RoutedExperts
from soli.model.transformer import Transformer

# Besides these, embedding, routers, norms and the attention core stay high: they are no `Linear`.
HIGH = ("lm_head", "eh_proj")


def use_fp8(model: Transformer) -> list[str]:
    """Let the linear layers and experts of every block, MTP blocks included, multiply in FP8; their names in order.

    Parameters, names and files are untouched: masters and gradients stay as wide as they are. A Hopper GPU multiplies
    in FP8; every other device emulates it.
    """
    kernels = emulation if cuda.missing(model.embed_tokens.weight.device) else cuda
    chosen = []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not name.endswith(HIGH):
            module.product = kernels.linear  # type: ignore[method-assign, assignment]
        elif isinstance(module, RoutedExperts):
            module.product = kernels.experts  # type: ignore[method-assign, assignment]
        else:
            continue
        chosen.append(name)
    return chosen


def fp8_note(device: torch.device) -> str:
    """One line on how this device multiplies in FP8, for whoever starts a run."""
    lacking = cuda.missing(device)
    return f"FP8 is emulated, exactly and slowly: {lacking}" if lacking else "FP8 products run on the GPU"
