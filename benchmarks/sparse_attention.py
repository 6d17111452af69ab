"""Sparse attention beside dense attention, as the sequence grows: one decode token through one attention layer.

The heads are DeepSeek-V3.2's: 128 of attention over latents of 512 + 64 values, and an indexer of 64 heads and 128
values that selects 2,048 tokens; bfloat16. The hidden state is narrower than V3.2's: its products cost the same at
every length, and what counts is how the cost grows. "dense attention" is the same layer without the indexer, V3's. The
last row is the growth itself, a straight line through all lengths by least squares.

    python benchmarks/sparse_attention.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import record
import torch

from soli.config import ModelConfig
from soli.engine.latent_cache import LatentCache
from soli.engine.runner import FusedRunner
from soli.model import Transformer

LENGTHS = (4096, 8192, 16384, 32768)
BLOCK = 64  # tokens of a KV block, as the engine has
DENSE = "dense attention"
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 1024,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": 0,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": LENGTHS[-1],
}
INDEXER: dict[str, Any] = {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}


def build(sparse: bool) -> Callable[[int], float]:
    """A contender, for `record.alone`: milliseconds of a decode token that is the last of so many."""
    changes = {"model_type": "deepseek_v32", **INDEXER} if sparse else {"model_type": "deepseek_v3"}
    model = Transformer(ModelConfig.from_dict(SHAPE | changes), dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    cache = LatentCache.whole_rows([LENGTHS[-1]], BLOCK)
    like = model.embed_tokens.weight
    cache.kv_blocks(0, SHAPE["kv_lora_rank"] + SHAPE["qk_rope_head_dim"], like).normal_(generator=generator)
    cache.kv_blocks(0, INDEXER["index_head_dim"], like, "index_key").normal_(generator=generator)
    runner = FusedRunner(model)

    def measure(length: int) -> float:
        step = cache.step([0], [length - 1], [1])
        with torch.inference_mode():
            start = time.process_time()
            runner.forward(torch.tensor([1]), step.positions_T, step, [])
        return 1000 * (time.process_time() - start)

    return measure


def slope(millis: list[float]) -> float:
    """Milliseconds for every 1,000 tokens more: of the line through one round's values at LENGTHS."""
    x = torch.tensor(LENGTHS, dtype=torch.float64) / 1000
    y = torch.tensor(millis, dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def main() -> None:
    arguments = record.parser(__doc__, rounds=9).parse_args()
    with record.alone(build, True) as sparse, record.alone(build, False) as dense:
        sides = {"sparse": sparse, DENSE: dense}
        contenders = {
            f"{name} {length}": lambda run=run, length=length: run(length)
            for name, run in sides.items()
            for length in LENGTHS
        }
        millis = record.interleaved(contenders, arguments.rounds)
    rows = []
    for length in LENGTHS:
        peers = {DENSE: millis[f"{DENSE} {length}"]}
        rows.append(record.row(f"decode attention, {length:,} tokens", "ms", millis[f"sparse {length}"], peers))
    slopes = {
        name: [slope([millis[f"{name} {length}"][number] for length in LENGTHS]) for number in range(arguments.rounds)]
        for name in sides
    }
    rows.append(record.row("growth for 1,000 tokens more", "ms", slopes["sparse"], {DENSE: slopes[DENSE]}))
    record.finish("sparse_attention", {**SHAPE, **INDEXER, "rounds": arguments.rounds}, rows)


if __name__ == "__main__":
    main()
