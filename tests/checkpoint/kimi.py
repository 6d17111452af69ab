"""Folders as Kimi K2.5 has them: the text model configured in an object of its own, its tensors below a prefix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoint.folders import edit_json, edit_tensors

PREFIX = "language_model."
VISION = {
    "vision_tower.patch_embed.proj.weight": (16, 3, 14, 14),
    "vision_tower.encoder.blocks.0.wqkv.weight": (48, 16),
    "mm_projector.proj.0.weight": (32, 64),
}
WHOLE = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
    "ignore_index": -100,
    "media_placeholder_token_id": 90,
    "model_type": "kimi_k25",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "use_unified_vision_chunk": True,
    "video_placeholder": "<|kimi_k25_video_placeholder|>",
    "vision_config": {"model_type": "", "vt_hidden_size": 16, "patch_size": 14},
}
# What transformers' base class writes into a nested configuration.
DEFAULTS = {"add_cross_attention": False, "bad_words_ids": None, "chunk_size_feed_forward": 0, "is_decoder": False,
            "num_beams": 1, "pruned_heads": {}, "temperature": 1.0, "top_k": 50, "torchscript": False}  # fmt: skip


def published_name(name: str) -> str:
    return PREFIX + name


def name_in_transformers(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


def make_kimi_k25(
    folder: Path, text_model_type: str = "kimi_k2", rename: Callable[[str], str] = published_name, **whole: Any
) -> Path:
    """Rewrite a folder of one file, of a text model, as that of a model of images and text."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [*tensors]:
            tensors[rename(name)] = tensors.pop(name)
        tensors |= {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in VISION.items()}

    def nest(config: dict[str, Any]) -> None:
        text = {**DEFAULTS, **config, "model_type": text_model_type}
        config.clear()
        config.update(WHOLE | {"text_config": text} | whole)

    edit_tensors(folder / "model.safetensors", edit)
    edit_json(folder / "config.json", nest)
    return folder
