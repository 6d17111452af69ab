"""Small models whose matrices have any of the five formats."""

import torch
from torch import nn

from soli.config import ModelConfig
from soli.kernels import QuantizedExperts, QuantizedWeight
from soli.model import Transformer
from soli.model.layers import Linear
from soli.model.moe import RoutedExperts
from tests.engine.tiny import BASE, KINDS
from tests.kernels.weights import random_weight

WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 20,
    "v_head_dim": 16,
    "n_shared_experts": 2,
}
INDEX_WIDTH = 32  # whole groups of int8 and int4


def quantized_model(format: str, dtype: torch.dtype, seed: int = 0, kind: str = "v3") -> Transformer:
    """Every matrix but the router and the embedding quantized, with random values."""
    generator = torch.Generator().manual_seed(seed)
    indexer = {"index_head_dim": INDEX_WIDTH} if "index_topk" in KINDS[kind] else {}
    model = Transformer(ModelConfig.from_dict(BASE | WIDTHS | KINDS[kind] | indexer)).eval()
    model.init_weights(generator)
    with torch.no_grad():
        for _, moe in model.moe_layers():
            moe.gate.weight.mul_(8.0)
    for module in model.to(dtype).modules():
        if isinstance(module, Linear):
            module.set_quantized(drawn(format, module, generator))
        elif isinstance(module, RoutedExperts):
            (E, F2, D), F = module.gate_up_proj.shape, module.down_proj.shape[2]
            shapes = ((F2 // 2, D), (F2 // 2, D), (D, F))
            parts = (tuple(scaled(format, shape, generator) for _ in range(E)) for shape in shapes)
            module.set_quantized(QuantizedExperts(*parts))
    return model


def drawn(format: str, module: nn.Linear, generator: torch.Generator) -> QuantizedWeight:
    return scaled(format, (module.out_features, module.in_features), generator)


def scaled(format: str, shape: tuple[int, int], generator: torch.Generator) -> QuantizedWeight:
    """Random quantized values with a variance of one over the inputs, so that rows keep their size."""
    weight, factor = random_weight(format, shape, 32, generator), shape[1] ** -0.5
    if weight.scale is None:
        return QuantizedWeight(format, (weight.values.float() * factor).to(weight.values.dtype), None, shape, 0)
    scale = (weight.scale.float() * factor).to(weight.scale.dtype)
    return QuantizedWeight(format, weight.values, scale, shape, weight.group)
