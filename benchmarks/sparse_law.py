"""Layers with more and more experts of which equally many are activated: the row "sparse" of cpu.py.

If a token costs what it activates, decoding takes as long with 256 experts as with 16, and a mixture as long as a dense
model of as many activated parameters; the router's own product, which grows with the experts, is measured with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import contenders
import models
import torch

from soli.config import ModelConfig
from soli.model import Transformer


def build(experts: int, shape: Mapping[str, Any], work: dict[str, int]) -> Callable[[str, bool], float]:
    """For `record.alone`: a few layers of `shape` with `experts` experts, or with none: dense and as wide as the
    activated ones. Weights repeat one block of random numbers, each in memory of its own."""
    width = (shape["num_experts_per_tok"] + shape["n_shared_experts"]) * shape["moe_intermediate_size"]
    changes = {"num_hidden_layers": 4, "vocab_size": 4096, "n_group": 1, "topk_group": 1, "intermediate_size": width}
    changes |= {"first_k_dense_replace": 0, "n_routed_experts": experts} if experts else {"first_k_dense_replace": 4}
    config = ModelConfig.from_dict({"model_type": "deepseek_v3", **shape, **changes})
    model = Transformer(config, dtype=torch.bfloat16).eval()
    block = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * models.STD).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.view(-1).split(block.numel()):
                part.copy_(block[: part.numel()] if parameter.dim() > 1 else torch.ones(()))
        for _, moe in model.moe_layers():
            moe.gate.e_score_correction_bias.zero_()
    return contenders.single_request(model, work)
