"""Auxiliary-loss-free balancing (section 2.1.2, traps 3-6): after each optimizer step, each bias moves by gamma.

Counts come from the routing values that the forward pass returned, so recomputed activations and evaluation cannot add
to them. They are summed over micro-batches by the trainer, over ranks by `reduce_counts`. L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from soli.config import ModelConfig
from soli.model.transformer import Transformer


def reduce_counts(counts_LE: Tensor) -> Tensor:
    """Tokens per expert (int64), summed over ranks: the one place where counts of several processes are added."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts_LE)
    return counts_LE


def mixture_names(config: ModelConfig, mtp_alone: bool = False) -> list[str]:
    """The names of a model's MoE layers in the order of their counts, MTP modules last: those of `model.moe_layers()`
    where a process has all of them. `mtp_alone`: where the modules alone are trained, and counted."""
    L = config.num_hidden_layers
    main = [] if mtp_alone else [f"layers.{layer}" for layer in range(L) if config.is_moe_layer(layer)]
    return main + [f"mtp.{k}" for k in range(config.num_nextn_predict_layers) if config.is_moe_layer(L + k)]


@torch.no_grad()
def step_bias(model: Transformer, counts_LE: Tensor, gamma: float, names: Sequence[str] | None = None) -> None:
    """b += gamma * sign(mean load - load), in place, for each MoE layer that this process has; `counts_LE` are those of
    the layers `names`, by default all in the order of `mixture_names`. Layers without counts were not computed and keep
    their biases.

    No centring: released biases are all positive (trap 4). A layer whose router has no bias is left as it is.
    """
    if gamma == 0:
        return
    counts = dict(zip(names or mixture_names(model.config), counts_LE, strict=False))
    for name, layer in model.moe_layers():
        bias_E = layer.gate.e_score_correction_bias
        counts_E = counts.get(name)
        if bias_E is not None and counts_E is not None:
            load_E = counts_E.to(bias_E.device, torch.float32)
            bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=gamma)


@dataclass(frozen=True)
class ExpertLoad:
    """How evenly the experts of one layer are loaded, over the tokens counted."""

    max_violation: float  # largest load / mean load - 1; 0 is perfect
    entropy: float  # of the load's distribution, as a share of the largest possible, 0 .. 1
    dead_experts: int  # that no token selected


def measure_load(counts_LE: Tensor) -> list[ExpertLoad]:
    """One `ExpertLoad` per layer."""
    if counts_LE.numel() == 0:
        return []
    load_LE = counts_LE.double().cpu()
    share_LE = load_LE / load_LE.sum(-1, keepdim=True)
    largest_entropy = torch.log(torch.tensor(max(load_LE.shape[-1], 2), dtype=torch.float64))
    entropy_L = torch.special.entr(share_LE).sum(-1) / largest_entropy
    violation_L = load_LE.amax(-1) / load_LE.mean(-1) - 1
    dead_L = (load_LE == 0).sum(-1)
    return list(map(ExpertLoad, violation_L.tolist(), entropy_L.tolist(), dead_L.tolist()))
