"""Write a V3-architecture model as the GGUF file that llama.cpp opens: bf16, q8_0 or q4_0, MTP modules left out.

The architecture is llama.cpp's `deepseek2`: experts stacked by layer, and kv_b_proj cut into the key half, transposed,
and the value half, which is the absorbed form that it computes with. Norms and routers are float32, all else has the
file's type; a matrix whose rows are no multiple of 32 becomes float16. Needs `pip install gguf`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from soli.checkpoint.load import open_checkpoint
from soli.checkpoint.name_map import Kind, Slot, slots
from soli.checkpoint.reader import Checkpoint
from soli.config import ModelConfig

Type = gguf.GGMLQuantizationType
TYPES = {"bf16": (Type.BF16, 32), "q8_0": (Type.Q8_0, 7), "q4_0": (Type.Q4_0, 2)}  # tensors', and the file's number
BLOCK, SCALE = {Type.Q4_0: 16, Type.Q8_0: 32}, {Type.Q4_0: 0.02 / 4.61, Type.Q8_0: 0.02 / 73.9}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp", "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.experts.0.gate_proj": "ffn_gate_exps", "mlp.experts.0.up_proj": "ffn_up_exps",
    "mlp.experts.0.down_proj": "ffn_down_exps",
}  # fmt: skip
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: name, shape, type, and its float32 values on demand."""

    name: str
    shape: tuple[int, ...]
    type: Any
    values: Callable[[], np.ndarray]


def write_gguf(file: Path, config: ModelConfig | None, source: str | Path | None, quant: str) -> None:
    """Write `file` from the folder `source`, or, without one, from `config` with random blocks of codes."""
    checkpoint = None if source is None else open_checkpoint(source, mtp=False)
    config = checkpoint.config if checkpoint is not None else config
    assert config is not None
    type, number = TYPES[quant]
    writer = gguf.GGUFWriter(str(file), "deepseek2", use_temp_file=False)
    writer.add_file_type(number)
    _write_shape(writer, config)
    _write_tokens(writer, checkpoint.folder if checkpoint is not None else None, config)
    entries = list(plan(config, checkpoint, type))
    for entry in entries:
        raw = entry.type not in (Type.F32, Type.F16)
        shape = gguf.quant_shape_to_byte_shape(entry.shape, entry.type) if raw else entry.shape
        dtype = np.dtype(np.uint8 if raw else np.float32 if entry.type == Type.F32 else np.float16)
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(entry.name, shape, dtype, size, raw_dtype=entry.type if raw else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for entry in entries:
        writer.write_tensor_data(_encoded(entry) if checkpoint is not None else _random(entry, rng))
    writer.close()


def plan(config: ModelConfig, checkpoint: Checkpoint | None, type: Any) -> Iterator[Entry]:
    """Every tensor of the file, in the order of the official files; a layer's experts as one."""
    every = slots(config) if checkpoint is None else checkpoint.slots

    def values(slot: Slot) -> np.ndarray:
        import torch

        assert checkpoint is not None
        return checkpoint.values(slot, torch.float32).numpy()

    experts: dict[str, list[Slot]] = {}
    for slot in every:
        if slot.expert is not None:
            experts.setdefault(EXPERT.sub(".experts.0.", slot.name), []).append(slot)
    for slot in every:
        if slot.expert is None:
            high = slot.kind is not Kind.LINEAR and slot.name not in ("model.embed_tokens.weight", "lm_head.weight")
            yield from _entries(slot, Type.F32 if high else type, config, values)
        elif slot.expert == 0:
            stack = experts[slot.name]
            yield _entry(_name(slot.name), (len(stack), *slot.shape), type, _stacked(stack, values))


def _entries(slot: Slot, type: Any, config: ModelConfig, values: Callable[[Slot], np.ndarray]) -> Iterator[Entry]:
    if not slot.name.endswith("self_attn.kv_b_proj.weight"):
        yield _entry(_name(slot.name), slot.shape, type, lambda: values(slot))
        return
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    latent = config.kv_lora_rank

    def halves() -> np.ndarray:
        return values(slot).reshape(heads, nope + value, latent)

    block = f"blk.{slot.layer}."
    yield _entry(block + "attn_k_b.weight", (heads, latent, nope), type, lambda: halves()[:, :nope].transpose(0, 2, 1))
    yield _entry(block + "attn_v_b.weight", (heads, value, latent), type, lambda: halves()[:, nope:])


def _entry(name: str, shape: Sequence[int], type: Any, values: Callable[[], np.ndarray]) -> Entry:
    ragged = type in BLOCK and shape[-1] % 32
    return Entry(name, tuple(shape), Type.F16 if ragged else type, values)


def _stacked(stack: Sequence[Slot], values: Callable[[Slot], np.ndarray]) -> Callable[[], np.ndarray]:
    return lambda: np.stack([values(slot) for slot in stack])


def _name(name: str) -> str:
    """A Hugging Face name as llama.cpp has it."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(\.weight)?", name)
    if match is None:
        return TOP[name.removesuffix(".weight")] + ".weight"
    part = PARTS[match[2]]
    return f"blk.{match[1]}.{part}" + (match[3] or "")


def _encoded(entry: Entry) -> np.ndarray:
    values = np.ascontiguousarray(entry.values(), dtype=np.float32)
    if entry.type == Type.F32:
        return values
    return values.astype(np.float16) if entry.type == Type.F16 else gguf.quants.quantize(values, entry.type)


def _random(entry: Entry, rng: np.random.Generator) -> np.ndarray:
    """Norms one, quantised blocks of random codes under one scale, all else normal; weights of deviation 0.02."""
    if entry.type not in BLOCK:
        values = np.ones(entry.shape) if "norm" in entry.name else rng.normal(0, 0.02, entry.shape)
        return values.astype(np.float32 if entry.type == Type.F32 else np.float16)
    blocks = np.empty((int(np.prod(entry.shape)) // 32, 2 + BLOCK[entry.type]), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(SCALE[entry.type]).tobytes(), np.uint8)
    blocks[:, 2:] = np.frombuffer(rng.bytes(blocks[:, 2:].size), np.uint8).reshape(len(blocks), -1)
    return blocks.reshape(*entry.shape[:-1], -1)


def _write_shape(writer: Any, config: ModelConfig) -> None:
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_name("soli-benchmark")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(rope)
    writer.add_vocab_size(config.vocab_size)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)


def _write_tokens(writer: Any, folder: Path | None, config: ModelConfig) -> None:
    import models

    if folder is None:
        tokenizer = models.tokenizer(config.vocab_size)
    else:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
