"""Small routers for the routing traps."""

import torch

from soli.config import ModelConfig
from soli.model import Router


def make_router(experts: int, groups: int, selected_groups: int, experts_per_token: int, **fields: object) -> Router:
    """A router of width 8 with random weights and zero bias."""
    config = ModelConfig(
        vocab_size=16,
        hidden_size=8,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=selected_groups,
        num_experts_per_tok=experts_per_token,
        **fields,  # type: ignore[arg-type]
    )
    router = Router(config, None, None)
    with torch.no_grad():
        router.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(1))
    return router


def literal_selection(
    affinity: list[float], bias: list[float], groups: int, selected_groups: int, experts_per_token: int
) -> list[int]:
    """Equation 16 and section 2.1.2's group limit for one token, in plain Python over lists."""
    biased = [s + b for s, b in zip(affinity, bias, strict=True)]
    size = len(biased) // groups
    score = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    selected = sorted(range(groups), key=lambda g: -score[g])[:selected_groups]
    candidates = [e for e in range(len(biased)) if e // size in selected]
    return sorted(candidates, key=lambda e: -biased[e])[:experts_per_token]
