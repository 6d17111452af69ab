"""The tensors of a GGUF file of llama.cpp's architecture `deepseek2`, planned from the names in Hugging Face files.

Two things differ from those. A layer's experts are one tensor, (E, F, D) or (E, D, F). And kv_b_proj is cut into its
key half, transposed, and its value half, which is the absorbed form that llama.cpp computes with. RoPE is interleaved
in both, so nothing is permuted.

Shapes: D hidden, E experts, F expert width, H heads, N nope width, V value width, C latent.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from torch import Tensor

from soli.checkpoint.name_map import HEAD, Kind, Slot
from soli.config import ModelConfig

TOP: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK: Final = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.experts.0.gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.experts.0.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.0.down_proj.weight": "ffn_down_exps.weight",
}
KV_B: Final = "self_attn.kv_b_proj.weight"
EXPERT: Final = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: `parts` one after another, each what `select` takes of a slot's values. `is_high`: norms,
    routers and their biases, float32 in every file."""

    name: str
    shape: tuple[int, ...]
    is_high: bool
    parts: Sequence[Slot]
    select: Callable[[Tensor], Tensor] = lambda values: values


def plan(config: ModelConfig, slots: Sequence[Slot]) -> Iterator[GgufTensor]:
    """Every tensor of the file, in the order of the slots, of which copies and MTP modules are left out."""
    stacks: dict[str, list[Slot]] = {}
    for slot in slots:
        if slot.expert is not None:
            stacks.setdefault(EXPERT.sub(".experts.0.", slot.name), []).append(slot)
    for slot in slots:
        if slot.copy or slot.expert not in (None, 0):
            continue
        if slot.expert == 0:
            stack = stacks[slot.name]
            yield GgufTensor(_name(slot), (len(stack), *slot.shape), False, stack)
        elif slot.name.endswith(KV_B):
            yield from _kv_b_halves(config, slot)
        else:
            is_matrix = slot.kind is Kind.LINEAR or slot.soli in ("embed_tokens.weight", HEAD)
            yield GgufTensor(_name(slot), slot.shape, not is_matrix, [slot])


def _kv_b_halves(config: ModelConfig, slot: Slot) -> Iterator[GgufTensor]:
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    latent = config.kv_lora_rank
    key_half, value_half = partial(_key_half, heads=heads, nope=nope), partial(_value_half, heads=heads, nope=nope)
    yield GgufTensor(f"blk.{slot.layer}.attn_k_b.weight", (heads, latent, nope), False, [slot], key_half)
    yield GgufTensor(f"blk.{slot.layer}.attn_v_b.weight", (heads, value, latent), False, [slot], value_half)


def _key_half(values: Tensor, heads: int, nope: int) -> Tensor:
    return values.unflatten(0, (heads, -1))[:, :nope].transpose(1, 2)


def _value_half(values: Tensor, heads: int, nope: int) -> Tensor:
    return values.unflatten(0, (heads, -1))[:, nope:]


def _name(slot: Slot) -> str:
    """A slot's name as llama.cpp has it."""
    if slot.layer is None:
        return TOP[slot.name]
    return f"blk.{slot.layer}.{BLOCK[slot.name.removeprefix(f'model.layers.{slot.layer}.')]}"
