"""Traces of V3's size without V3: real routers, 256 experts in 8 groups, with random weights, on random walks.

The decisions are real (`trace_layer` makes the traces), the text is not, and the model's name says so.
"""

from functools import cache
from typing import Any

import torch

from soli.analysis.parameters import count
from soli.analysis.trace import trace_layer
from soli.config import preset, replace
from soli.model import Router
from tests.serve.page.mock_server import Piece

WIDTH = 48
TEXT = (
    "The old river carries what the mountains lose : sand , seeds and small round stones . In spring it is loud and "
    "brown ; by autumn one can hear each note of it . 老 河 带走 山 失去 的 一切 ： 沙 、 种子 和 圆 石 。 "
    "春天 它 又 响 又 黄 ， 到了 秋天 ， 人们 能 听见 每 一 个 音符 。"
)
WORDS = TEXT.split()


def giant_model(layers: int = 58) -> dict[str, Any]:
    """The answer of `GET /soli/model`: V3's own counts; its MoE layers are layers.3 to layers.60."""
    config, first = preset("deepseek-v3"), 61 - layers
    counted = count(config)
    return {
        "name": "DeepSeek-V3's shape, random routers",
        "layers": [f"layers.{n}" for n in range(first, 61)],
        "experts": config.n_routed_experts,
        "chosen": config.num_experts_per_tok,
        "groups": config.n_group,
        "kept_groups": config.topk_group,
        "total": counted.total,
        "activated": counted.activated,
        "modes": ["chat", "complete"],
        "context": 163840,
    }


@cache
def giant_piece(tokens: int, layers: int = 58, different: int = 64, text: str = "giant", seed: int = 0) -> Piece:
    """`tokens` tokens of which the first 16 are the prompt; after `different` of them the decisions repeat."""
    draw = torch.Generator().manual_seed(seed)
    config = replace(preset("deepseek-v3"), {"hidden_size": WIDTH})
    words = torch.randn(len(WORDS), WIDTH, generator=draw)
    x_TD = torch.stack([words[t % len(WORDS)] for t in range(different)])
    decisions = []
    for name in giant_model(layers)["layers"]:
        router = Router(config, None, torch.float32)
        with torch.no_grad():
            router.weight.normal_(0.0, 0.3, generator=draw)
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias.normal_(0.0, 0.012, generator=draw)
            x_TD = 0.96 * x_TD + 0.28 * torch.randn(different, WIDTH, generator=draw)
            decisions.append(trace_layer(name, router, router(x_TD)))
    plain = [[_plain(layer[t]) for layer in decisions] for t in range(different)]
    return Piece(text, [_token(t, plain[t % different]) for t in range(tokens)])


def _token(t: int, layers: list[dict[str, Any]]) -> dict[str, Any]:
    word = WORDS[t % len(WORDS)]
    part = "prompt" if t < 16 else "answer"
    return {"position": t, "token": t, "text": f" {word}" if word.isascii() else word, "part": part, "layers": layers}


def _plain(layer: Any) -> dict[str, Any]:
    def rounded(thing: Any) -> dict[str, Any]:
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in vars(thing).items()}

    fields = ("selected", "demoted_by_bias", "runner_ups")
    lists = {name: [rounded(expert) for expert in getattr(layer, name)] for name in fields}
    return {"layer": layer.layer, **lists, "groups": layer.groups}
