"""Small model folders to read, write and damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from soli.checkpoint import save_model
from soli.config import ModelConfig
from soli.model import Transformer
from tests.model.oracle import draw_config, make_model

INDEX = "model.safetensors.index.json"

# Every mechanism, sides that are no multiples of 128, one that spans two blocks.
FULL = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "hidden_size": 136,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 20,
    "attention_bias": False,
    "num_nextn_predict_layers": 1,
    "rope_interleave": True,
}


def full_config(**changes: Any) -> ModelConfig:
    return draw_config(0, **(FULL | changes))


def full_model(**changes: Any) -> Transformer:
    return make_model(full_config(**changes)).eval()


def saved(folder: Path, **options: Any) -> Path:
    """A folder with a full model, as `save_model` writes it."""
    save_model(full_model(), folder, **options)
    return folder


def edit_tensors(file: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite one shard with the safetensors library after `edit` changed its tensors in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def weight_map(folder: Path) -> dict[str, str]:
    shard_of: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return shard_of


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
