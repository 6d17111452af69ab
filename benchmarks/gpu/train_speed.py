"""Tokens per second and MFU of whole training steps: Soli in bf16 and FP8, transformers, and a dense model.

Steps are forward, losses, backward, clip and fused AdamW over fp32 masters, on random tokens. MFU is three forward
passes' FLOPs per token (`soli count`) over the chip's nominal 989 TFLOP/s in bf16, for FP8 too. Shapes: `1b`, that of
src/soli/recipes/one-gpu (1 B parameters, 0.2 B active), and `3b`, wider, to fill the chip. Beside them: transformers'
DeepseekV3ForCausalLM with each experts implementation (where the package is), no MTP on either side, and Soli with
dense layers of equal activated width. Contenders run one after the other; what one held is freed for the next.

    python benchmarks/gpu/train_speed.py --shape 1b --sequences 16
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import chip
import torch

from soli.analysis.parameters import count, flops
from soli.config import ModelConfig, preset, replace
from soli.data.recipe import find_recipe, load_recipe
from soli.model import Transformer
from soli.train.balance import step_bias
from soli.train.losses import compute_losses, count_targets
from soli.train.model_options import use_fp8
from soli.train.optimizer import Optimizer
from soli.train.settings import OptimizerSettings, read_settings

NOMINAL, NO_EOS = 989e12, -1
WIDER = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 16,
         "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512,
         "max_position_embeddings": 4096}  # fmt: skip
Step = Callable[[torch.Tensor], None]


def shape(name: str) -> ModelConfig:
    """The shapes by name, without MTP."""
    if name == "tiny":
        return replace(preset("nano"), {"num_nextn_predict_layers": 0, "num_hidden_layers": 2})
    config = replace(read_settings(load_recipe(find_recipe("one-gpu"), [])).model, {"num_nextn_predict_layers": 0})
    return config if name == "1b" else replace(config, WIDER)


def dense(config: ModelConfig) -> ModelConfig:
    """The same network with dense layers as wide as the experts that a token uses, shared ones included."""
    width = config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    return replace(config, {"first_k_dense_replace": config.num_hidden_layers, "intermediate_size": width})


def soli_step(config: ModelConfig, precision: str) -> Step:
    at = chip.device()
    model = Transformer(config, device=at, dtype=torch.float32)
    model.init_weights(torch.Generator(at).manual_seed(0))
    model.compute_dtype = torch.bfloat16
    if precision == "fp8":
        use_fp8(model)
    optimizer = Optimizer(model, OptimizerSettings(), torch.bfloat16)

    def step(window_BW: torch.Tensor) -> None:
        depth = config.num_nextn_predict_layers
        losses = compute_losses(model, window_BW, count_targets(window_BW, depth, NO_EOS), NO_EOS)
        losses.total(0.3, 1e-4).backward()
        optimizer.step(1e-4)
        step_bias(model, losses.counts_LE, 1e-3)

    return step


def peer_step(config: ModelConfig, implementation: str) -> Step:
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    at = chip.device()
    known = DeepseekV3Config.from_dict(config.to_dict())
    model = AutoModelForCausalLM.from_config(
        known, dtype=torch.float32, experts_implementation=implementation, attn_implementation="sdpa"
    ).to(at)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(window_BW: torch.Tensor) -> None:
        target = window_BW[:, 1:].contiguous()
        with torch.autocast(at.type, torch.bfloat16):
            loss = model(window_BW[:, :-1], labels=target, shift_labels=target, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    config: ModelConfig, build: Callable[[], Step], sequences: int, length: int, repeats: int
) -> dict[str, Any]:
    """Tokens per second and MFU of one contender."""
    gc.collect()
    at = chip.device()
    if at.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = build()
    width = length + 1 + config.num_nextn_predict_layers
    windows = iter(torch.randint(3, config.vocab_size, (repeats + 3, sequences, width), device=at))
    step(next(windows)), step(next(windows))
    seconds = chip.seconds(lambda: step(next(windows)), repeats)
    flops_per_step = 3 * flops(config, length).prefill * sequences * length
    peak = torch.cuda.max_memory_allocated() / 2**30 if at.type == "cuda" else 0.0
    return {"ms": seconds * 1e3, "tokens_s": sequences * length / seconds, "tflops": flops_per_step / seconds / 1e12,
            "mfu": flops_per_step / seconds / NOMINAL, "peak_gib": peak}  # fmt: skip


def main() -> None:
    parser = chip.parser(__doc__)
    parser.add_argument("--shape", choices=("1b", "3b"), default="1b")
    parser.add_argument("--sequences", type=int, default=16, help="in a step (default 16)")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a sequence (default 1024)")
    arguments = parser.parse_args()
    tiny = arguments.tiny
    chip.require_gpu(tiny)
    sequences, length, repeats = (2, 32, 2) if tiny else (arguments.sequences, arguments.length, 10)
    config = shape("tiny" if tiny else arguments.shape)
    flat, mtp = dense(config), replace(config, {"num_nextn_predict_layers": 1})
    contenders: list[tuple[str, ModelConfig, Callable[[], Step]]] = [
        ("soli bf16", config, lambda: soli_step(config, "bf16")),
        ("soli fp8", config, lambda: soli_step(config, "fp8")),
        ("soli dense, equal activated, bf16", flat, lambda: soli_step(flat, "bf16")),
        ("soli bf16 with MTP (FLOPs without it)", mtp, lambda: soli_step(mtp, "bf16")),
        *((f"transformers {name}, bf16 autocast", config, lambda name=name: peer_step(config, name))
          for name in ("grouped_mm", "batched_mm", "eager") if not tiny or name == "eager"),
    ]  # fmt: skip
    rows = []
    for what, its, build in contenders:
        rows.append(chip.attempt(what, lambda c=its, b=build: measure(c, b, sequences, length, repeats)))
    size = {"shape": arguments.shape, "sequences": sequences, "length": length,
            "parameters": count(config).total, "activated": count(config).activated}  # fmt: skip
    ceiling = chip.ceilings(tiny)
    chip.finish(f"train_speed_{arguments.shape}", arguments, {"ceilings": ceiling, "size": size, "rows": rows})


if __name__ == "__main__":
    main()
