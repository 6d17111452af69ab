"""Auxiliary-loss-free balancing (section 2.1.2, traps 3-6): after each optimizer step, each bias moves by gamma.

Counts come from the routing values that the forward pass returned, so recomputed activations and evaluation cannot add
to them. They are summed over micro-batches by the trainer, over ranks by `reduce_counts`. L MoE layers, E experts.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from soli.model.transformer import Transformer


def reduce_counts(counts_LE: Tensor) -> Tensor:
    """Tokens per expert (int64), summed over ranks: the one place where counts of several processes are added."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts_LE)
    return counts_LE


@torch.no_grad()
def step_bias(model: Transformer, counts_LE: Tensor, gamma: float) -> None:
    """b += gamma * sign(mean load - load), in place, for each layer of `model.moe_layers()`, MTP modules last; those
    without counts were not computed and keep their biases.

    No centring: released biases are all positive (trap 4). A layer whose router has no bias is left as it is.
    """
    if gamma == 0:
        return
    for (_, layer), counts_E in zip(model.moe_layers(), counts_LE, strict=False):
        bias_E = layer.gate.e_score_correction_bias
        if bias_E is not None:
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
