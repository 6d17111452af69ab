"""FP8 training as in the paper (section 3.3): which modules multiply in E4M3, and which stay high."""

from __future__ import annotations

from soli.kernels import fp8_training
from soli.model.layers import Linear
from soli.model.moe import RoutedExperts
from soli.model.transformer import Transformer

# Besides these, embedding, routers, norms and the attention core stay high: they are no `Linear`.
HIGH = ("lm_head", "eh_proj")


def use_fp8(model: Transformer) -> list[str]:
    """Let the linear layers and experts of every block, MTP blocks included, multiply in FP8; their names in order.

    Parameters, names and files are untouched: masters and gradients stay as wide as they are.
    """
    chosen = []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not name.endswith(HIGH):
            module.product = fp8_training.linear  # type: ignore[method-assign, assignment]
        elif isinstance(module, RoutedExperts):
            module.product = fp8_training.experts  # type: ignore[method-assign, assignment]
        else:
            continue
        chosen.append(name)
    return chosen
