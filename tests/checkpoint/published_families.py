"""Folders of each family with the tensors that published ones have, and of full-size models with their headers alone.
Names, shapes and dtypes are listed here, independent of the name map."""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name


def published_tensors(config: Mapping[str, Any]) -> Tensors:
    """What a folder with this config.json holds, at bf16."""
    text = config.get("text_config", config)
    tensors = dict(_text_tensors(text))
    if config is text:
        return tensors
    prefixed = {f"language_model.{name}": value for name, value in tensors.items()}
    vision = {
        "vision_tower.patch_conv.weight": ("BF16", (16, 3, 14, 14)),
        "multi_modal_projector.linear_1.weight": ("BF16", (text["hidden_size"], 16)),
    }
    return prefixed | vision


def _text_tensors(c: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    def matrix(name: str, *shape: int, dtype: str = "BF16") -> tuple[str, tuple[str, tuple[int, ...]]]:
        return f"{name}.weight", (dtype, shape)

    D, V, kind = c["hidden_size"], c["vocab_size"], c["model_type"]
    experts = c.get("n_routed_experts", c.get("num_experts", 0))
    modules = c.get("num_nextn_predict_layers", 0)
    yield matrix("model.embed_tokens", V, D)
    yield matrix("model.norm", D)
    if not c.get("tie_word_embeddings"):
        yield matrix("lm_head", V, D)
    for i in range(c["num_hidden_layers"] + modules):
        layer = f"model.layers.{i}"
        yield from (matrix(f"{layer}.{name}", D) for name in ("input_layernorm", "post_attention_layernorm"))
        yield from (matrix(f"{layer}.self_attn.{name}", *shape) for name, shape in _attention(c))
        if kind == "axk1":
            yield matrix(f"{layer}.post_mlp_layernorm", D)
        if i >= c["num_hidden_layers"]:
            yield from (matrix(f"{layer}.{name}", D) for name in ("enorm", "hnorm", "shared_head.norm"))
            yield matrix(f"{layer}.eh_proj", D, 2 * D)
            yield from (matrix(f"{layer}.{name}", V, D) for name in ("embed_tokens", "shared_head.head"))
        if not experts or i < c.get("first_k_dense_replace", 0):
            yield from _mlp(f"{layer}.mlp", D, c["intermediate_size"])
            continue
        F = c["moe_intermediate_size"]
        yield matrix(f"{layer}.mlp.gate", experts, D)
        if kind not in ("mistral4", "axk1"):
            yield f"{layer}.mlp.gate.e_score_correction_bias", ("F32", (experts,))
        shared = c.get("n_shared_experts", c.get("num_shared_experts"))
        yield from _mlp(f"{layer}.mlp.shared_experts", D, F * shared)
        if kind == "mistral4":  # no other layout of it is known to transformers
            yield f"{layer}.mlp.experts.gate_up_proj", ("BF16", (experts, 2 * F, D))
            yield f"{layer}.mlp.experts.down_proj", ("BF16", (experts, D, F))
        else:
            for expert in range(experts):
                yield from _mlp(f"{layer}.mlp.experts.{expert}", D, F)


def _mlp(name: str, D: int, F: int) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    yield f"{name}.gate_proj.weight", ("BF16", (F, D))
    yield f"{name}.up_proj.weight", ("BF16", (F, D))
    yield f"{name}.down_proj.weight", ("BF16", (D, F))


def _attention(c: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, H, C, R = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    N, V, Q = c["qk_nope_head_dim"], c["v_head_dim"], c.get("q_lora_rank")
    if Q is None:
        yield "q_proj", (H * (N + R), D)
    else:
        yield from (("q_a_proj", (Q, D)), ("q_a_layernorm", (Q,)), ("q_b_proj", (H * (N + R), Q)))
    yield from (("kv_a_proj_with_mqa", (C + R, D)), ("kv_a_layernorm", (C,)))
    yield from (("kv_b_proj", (H * (N + V), C)), ("o_proj", (D, H * V)))


def write_published(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """A small folder with random weights that matter."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in published_tensors(config).items():
        values = torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else 0.2)
        values += 1.0 if "norm" in name else 0.0
        tensors[name] = values.to(DTYPES[dtype])
    for name in tensors:  # MTP modules repeat embedding and head
        for end, original in (("embed_tokens.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight")):
            if name.endswith(end) and original in tensors:
                tensors[name] = tensors[original].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_headers(folder: Path, config: Mapping[str, Any]) -> Path:
    """A full-size folder: one file with its header, and a hole where the values are."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    at, header = 0, {}
    for name, (dtype, shape) in published_tensors(config).items():
        end = at + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return folder
