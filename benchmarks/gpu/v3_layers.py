"""Decode and prefill at DeepSeek-V3's real layer shapes, bf16, random weights, as many layers as fit, against ceilings.

Decoding is bound by memory: its floor is the bytes of the weights that were touched (attention, shared expert, head,
and the experts that this batch chose, counted) and of the cache, over the copy's GB/s. Prefill is bound by arithmetic:
its floor is its FLOPs over a large product's. A share of 1 would be the floor itself.

    python benchmarks/gpu/v3_layers.py
"""

from __future__ import annotations

from typing import Any

import chip
import torch

from soli.analysis.parameters import flops
from soli.config import ModelConfig, preset, replace
from soli.engine.latent_cache import LatentCache
from soli.model import Transformer
from soli.model.moe import MoE

MOE_LAYER_GIB, REST_GIB = 21.5, 14  # bf16: 256 experts of 44 M and the rest of a layer; embedding, head, work space
TINY = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}


def shape(tiny: bool) -> ModelConfig:
    """V3 with one dense layer and the MoE layers that fit."""
    if tiny:
        return replace(preset("nano"), TINY)
    free, _ = torch.cuda.mem_get_info()
    layers = max(1, int((free / 2**30 - REST_GIB) // MOE_LAYER_GIB))
    return replace(preset("deepseek-v3"), TINY | {"num_hidden_layers": 1 + layers})


def decode(model: Transformer, batch: int, context: int, ceiling: dict[str, Any], repeats: int) -> dict[str, Any]:
    """One token for each of `batch` sequences that have `context` tokens in the cache."""
    config, device = model.config, model.embed_tokens.weight.device
    cache, dtype = LatentCache.whole_rows([context + 1] * batch), model.embed_tokens.weight.dtype
    context_step = cache.step(range(batch), [0] * batch, [context] * batch, device)
    for layer in range(config.num_hidden_layers):
        width = config.kv_lora_rank + config.qk_rope_head_dim
        context_step.write(layer, torch.randn(batch * context, width, device=device, dtype=dtype))
    ids = torch.randint(0, config.vocab_size, (1, batch), device=device)
    step = cache.step(range(batch), [context] * batch, [1] * batch, device)
    positions = step.positions_T[None]
    activated = sum(int((layer.counts_E() > 0).sum()) for layer in model.backbone(ids, positions, step).routing)
    seconds = chip.seconds(lambda: model.head(model.backbone(ids, positions, step).hidden_BTD), repeats)
    separate = ("mlp.experts.", "embed_tokens")  # counted by what is activated; one row a token
    weights = sum(p.nbytes for name, p in model.named_parameters() if not any(part in name for part in separate))
    moe = next(layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE))
    expert = moe.experts.gate_up_proj[0].nbytes + moe.experts.down_proj[0].nbytes
    bytes_ = weights + activated * expert + cache.nbytes()
    floor = bytes_ / (ceiling["copy_gb_s"] * 1e9)
    return {"ms": seconds * 1e3, "tokens_s": batch / seconds, "experts_touched": activated, "gb": bytes_ / 1e9,
            "share_of_memory_ceiling": floor / seconds}  # fmt: skip


def prefill(model: Transformer, batch: int, length: int, ceiling: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Read `batch` prompts of `length` tokens from nothing."""
    config, device = model.config, model.embed_tokens.weight.device
    ids = torch.randint(0, config.vocab_size, (batch, length), device=device)
    seconds = chip.seconds(lambda: model.head(model.backbone(ids).hidden_BTD[:, -1]), repeats)
    head = 2 * batch * (length - 1) * model.lm_head.weight.numel()  # only the last token goes through it
    flops_done = batch * length * flops(config, length).prefill - head
    return {"ms": seconds * 1e3, "tokens_s": batch * length / seconds, "tflops": flops_done / seconds / 1e12,
            "share_of_bf16_ceiling": flops_done / seconds / (ceiling["bf16_tflops"] * 1e12)}  # fmt: skip


def main() -> None:
    arguments = chip.parser(__doc__).parse_args()
    tiny, repeats = arguments.tiny, 2 if arguments.tiny else 10
    chip.require_gpu(tiny)
    ceiling = chip.ceilings(tiny)
    config, device = shape(tiny), chip.device()
    model = Transformer(config, device=device, dtype=torch.bfloat16)
    model.init_weights(torch.Generator(device).manual_seed(0))
    rows = []
    with torch.inference_mode():
        for batch, context in [(2, 20)] if tiny else [(1, 4096), (8, 4096), (32, 4096), (128, 4096)]:
            rows.append(chip.attempt(f"decode, batch {batch}, context {context}",
                                     lambda b=batch, s=context: decode(model, b, s, ceiling, repeats)))  # fmt: skip
        for batch, length in [(1, 20)] if tiny else [(1, 512), (1, 4096), (4, 4096)]:
            rows.append(chip.attempt(f"prefill, {batch} x {length}",
                                     lambda b=batch, t=length: prefill(model, b, t, ceiling, repeats)))  # fmt: skip
    layers = {"dense": config.first_k_dense_replace, "moe": config.num_hidden_layers - config.first_k_dense_replace}
    chip.finish("v3_layers", arguments, {"ceilings": ceiling, "layers": layers, "rows": rows})


if __name__ == "__main__":
    main()
