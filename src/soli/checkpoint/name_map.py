"""Names in Hugging Face files <-> names in the Soli module, as tables; from them every tensor of a model.

A `NameRow` is one line of the map. `slots(config)` unrolls the rows over layers, experts and MTP modules into `Slot`s:
each is one tensor of the files, with its shape and its place in Soli. Nothing here looks at a file or needs torch.

The two sides differ in two things. Experts are separate tensors in files and stacked in Soli: `gate_up_proj` (E, 2F, D)
with the gate's rows first, `down_proj` (E, D, F). And MTP module k is HF layer L+k with copies of embedding and head,
which Soli shares with the main model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from soli.config import ModelConfig


class Kind(Enum):
    """How the official FP8 files store a tensor."""

    LINEAR = "linear weight"  # E4M3 blocks with a scale beside it
    HIGH = "high-precision tensor"  # embedding, head, router, norms, biases, eh_proj: bf16
    ROUTER_BIAS = "router bias"  # fp32 in every format: a bf16 bias near 5 cannot move by 0.001


# q_a_proj.weight -> q_a_proj.weight_scale_inv
SCALE_SUFFIX: Final = {"fp8": "_scale_inv", "int8": "_scale", "int4": "_scale", "int4_bf16": "_scale"}
HEAD: Final = "lm_head.weight"


@dataclass(frozen=True)
class NameRow:
    """A line of the map. `{i}` HF layer, `{block}` Soli's name of that layer, `{k}` MTP module, `{e}` expert.

    `shape` is in symbols of `_dimensions`; `when` is a fact of `_facts` that must hold; `copy` marks a tensor that
    files may repeat or leave out, because its value is that of `soli`.
    """

    hf: str
    soli: str
    shape: tuple[str, ...]
    kind: Kind = Kind.LINEAR
    when: str = "always"
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the files: HF name, shape, kind, and its place in Soli's state dict.

    Expert tensors fill rows `first_row : first_row + shape[0]` of `soli[expert]`; `expert` is None for all others.
    `layer` is the HF layer, None outside of layers.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    soli: str
    layer: int | None = None
    expert: int | None = None
    first_row: int = 0
    copy: bool = False

    def scale_name(self, format: str) -> str:
        """Name of the scales of this weight in a format that Soli writes."""
        return self.name + SCALE_SUFFIX[format]

    @property
    def is_expert(self) -> bool:
        """Whether it is a weight of a routed expert."""
        return self.expert is not None

    @property
    def integer(self) -> bool:
        """Whether int8 and int4 quantize this weight: the linear ones, and a head that is not the embedding."""
        return self.kind is Kind.LINEAR or self.soli == HEAD


HIGH: Final = Kind.HIGH
ROUTER_BIAS: Final = Kind.ROUTER_BIAS

TOP: Final = (
    NameRow("model.embed_tokens.weight", "embed_tokens.weight", ("V", "D"), HIGH),
    NameRow("model.norm.weight", "norm.weight", ("D",), HIGH),
    NameRow("lm_head.weight", "lm_head.weight", ("V", "D"), HIGH, "untied"),
    NameRow("lm_head.weight", "embed_tokens.weight", ("V", "D"), HIGH, "tied", copy=True),
)

# In a block both sides use the same tail: "model.layers.{i}." and "{block}." are put before it.
BLOCK: Final = (
    NameRow("input_layernorm.weight", "input_layernorm.weight", ("D",), HIGH),
    NameRow("self_attn.q_proj.weight", "self_attn.q_proj.weight", ("H*(N+R)", "D"), when="full_q"),
    NameRow("self_attn.q_a_proj.weight", "self_attn.q_a_proj.weight", ("Q", "D"), when="low_rank_q"),
    NameRow("self_attn.q_a_proj.bias", "self_attn.q_a_proj.bias", ("Q",), HIGH, "low_rank_q_with_bias"),
    NameRow("self_attn.q_a_layernorm.weight", "self_attn.q_a_layernorm.weight", ("Q",), HIGH, "low_rank_q"),
    NameRow("self_attn.q_b_proj.weight", "self_attn.q_b_proj.weight", ("H*(N+R)", "Q"), when="low_rank_q"),
    NameRow("self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight", ("C+R", "D")),
    NameRow("self_attn.kv_a_proj_with_mqa.bias", "self_attn.kv_a_proj_with_mqa.bias", ("C+R",), HIGH, "attention_bias"),
    NameRow("self_attn.kv_a_layernorm.weight", "self_attn.kv_a_layernorm.weight", ("C",), HIGH),
    NameRow("self_attn.kv_b_proj.weight", "self_attn.kv_b_proj.weight", ("H*(N+Dv)", "C")),
    NameRow("self_attn.o_proj.weight", "self_attn.o_proj.weight", ("D", "H*Dv")),
    NameRow("self_attn.o_proj.bias", "self_attn.o_proj.bias", ("D",), HIGH, "attention_bias"),
    NameRow("post_attention_layernorm.weight", "post_attention_layernorm.weight", ("D",), HIGH),
)

INDEXER: Final = (
    NameRow("self_attn.indexer.wq_b.weight", "self_attn.indexer.wq_b.weight", ("J*W", "Q")),
    NameRow("self_attn.indexer.wk.weight", "self_attn.indexer.wk.weight", ("W", "D")),
    NameRow("self_attn.indexer.k_norm.weight", "self_attn.indexer.k_norm.weight", ("W",), HIGH),
    NameRow("self_attn.indexer.k_norm.bias", "self_attn.indexer.k_norm.bias", ("W",), HIGH),
    NameRow("self_attn.indexer.weights_proj.weight", "self_attn.indexer.weights_proj.weight", ("J", "D"), HIGH),
)

DENSE: Final = (
    NameRow("mlp.gate_proj.weight", "mlp.gate_proj.weight", ("I", "D")),
    NameRow("mlp.up_proj.weight", "mlp.up_proj.weight", ("I", "D")),
    NameRow("mlp.down_proj.weight", "mlp.down_proj.weight", ("D", "I")),
)

MOE: Final = (
    NameRow("mlp.gate.weight", "mlp.gate.weight", ("E", "D"), HIGH),
    NameRow("mlp.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias", ("E",), ROUTER_BIAS, "biased"),
    NameRow("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.gate_proj.weight", ("F*S", "D"), when="shared"),
    NameRow("mlp.shared_experts.up_proj.weight", "mlp.shared_experts.up_proj.weight", ("F*S", "D"), when="shared"),
    NameRow("mlp.shared_experts.down_proj.weight", "mlp.shared_experts.down_proj.weight", ("D", "F*S"), when="shared"),
    NameRow("post_mlp_layernorm.weight", "post_mlp_layernorm.weight", ("D",), HIGH, "normed_mixture"),
)

EXPERT: Final = (  # gate and up share a stack: the second of two rows with one Soli name starts where the first ends
    NameRow("mlp.experts.{e}.gate_proj.weight", "mlp.experts.gate_up_proj", ("F", "D")),
    NameRow("mlp.experts.{e}.up_proj.weight", "mlp.experts.gate_up_proj", ("F", "D")),
    NameRow("mlp.experts.{e}.down_proj.weight", "mlp.experts.down_proj", ("D", "F")),
)

MTP: Final = (  # besides the rows of a block; eh_proj has no scale in the official index: it has high precision
    NameRow("model.layers.{i}.embed_tokens.weight", "embed_tokens.weight", ("V", "D"), HIGH, copy=True),
    NameRow("model.layers.{i}.enorm.weight", "mtp.{k}.enorm.weight", ("D",), HIGH),
    NameRow("model.layers.{i}.hnorm.weight", "mtp.{k}.hnorm.weight", ("D",), HIGH),
    NameRow("model.layers.{i}.eh_proj.weight", "mtp.{k}.eh_proj.weight", ("D", "2*D"), HIGH),
    NameRow("model.layers.{i}.shared_head.norm.weight", "mtp.{k}.norm.weight", ("D",), HIGH),
    NameRow("model.layers.{i}.shared_head.head.weight", "lm_head.weight", ("V", "D"), HIGH, "untied", copy=True),
    NameRow("model.layers.{i}.shared_head.head.weight", "embed_tokens.weight", ("V", "D"), HIGH, "tied", copy=True),
)

# Buffers that some exports write and every reader recomputes, scales of a quantized cache, and what fills the pages
# of a pack: known, and ignored.
IGNORED: Final = (
    "model.rotary_emb.*", "model.layers.*.self_attn.rotary_emb.*", "model.layers.*.rotary_emb.*",
    "model.layers.*.self_attn.*k_scale", "model.layers.*.self_attn.*v_scale", "model.layers.*.self_attn.*q_scale",
    "model.layers.*.self_attn.*prob_scale", "model.layers.*.self_attn.masked_bias", "model.position_ids",
    "model.layers.*.mlp.experts.*.padding",
    # scales of quantized activations
    "*.input_scale", "*.input_global_scale", "*.activation_scale", "*_activation_scale", "*.output_scale",
)  # fmt: skip


def slots(config: ModelConfig) -> tuple[Slot, ...]:
    """Every tensor of a checkpoint with this configuration, in the order of the official files, copies included."""
    return tuple(unroll_slots(config))


def unroll_slots(config: ModelConfig) -> Iterator[Slot]:
    """The same one after another, for a configuration that nothing has checked yet: it may have 10^9 layers."""
    dims, facts = _dimensions(config), _facts(config)

    def unroll(rows: tuple[NameRow, ...], layer: int | None = None, block: str = "", k: int = 0) -> Iterator[Slot]:
        hf, soli = (f"model.layers.{layer}.", f"{block}.") if block else ("", "")
        for row in rows:
            if row.when in facts:
                yield Slot(
                    hf + row.hf.format(i=layer),
                    _shape(row, dims),
                    row.kind,
                    soli + row.soli.format(k=k),
                    layer,
                    copy=row.copy,
                )

    def unroll_block(layer: int, block: str, moe: bool) -> Iterator[Slot]:
        indexer = INDEXER if config.has_indexer(layer) else ()
        yield from unroll(BLOCK + indexer + (MOE if moe else DENSE), layer, block)
        if moe:
            yield from _experts(config.n_routed_experts, dims, layer, block)

    depth = config.num_hidden_layers
    yield from unroll(TOP[:1])
    for layer in range(depth):
        yield from unroll_block(layer, f"layers.{layer}", config.is_moe_layer(layer))
    for k in range(config.num_nextn_predict_layers):
        yield from unroll(MTP, depth + k, k=k)
        yield from unroll_block(depth + k, f"mtp.{k}.block", bool(config.n_routed_experts))
    yield from unroll(TOP[1:])


def _experts(count: int, dims: dict[str, int], layer: int, block: str) -> Iterator[Slot]:
    for expert in range(count):
        rows_of: dict[str, int] = {}  # filled so far, by tensor of Soli
        for row in EXPERT:
            shape = _shape(row, dims)
            first_row = rows_of.get(row.soli, 0)
            rows_of[row.soli] = first_row + shape[0]
            name = f"model.layers.{layer}.{row.hf.format(e=expert)}"
            yield Slot(name, shape, row.kind, f"{block}.{row.soli}", layer, expert, first_row)


def _shape(row: NameRow, dims: dict[str, int]) -> tuple[int, ...]:
    return tuple(dims[symbol] for symbol in row.shape)


def _dimensions(config: ModelConfig) -> dict[str, int]:
    heads, value = config.num_attention_heads, config.v_head_dim
    index_width = config.index_head_dim or 0
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "2*D": 2 * config.hidden_size,
        "I": config.intermediate_size,
        "F": config.moe_intermediate_size or 0,
        "F*S": (config.moe_intermediate_size or 0) * (config.n_shared_experts or 0),
        "E": config.n_routed_experts or 0,
        "Q": config.q_lora_rank or 0,
        "C": config.kv_lora_rank,
        "C+R": config.kv_lora_rank + config.qk_rope_head_dim,
        "H*(N+R)": heads * config.qk_head_dim,
        "H*(N+Dv)": heads * (config.qk_nope_head_dim + value),
        "H*Dv": heads * value,
        "J": config.index_n_heads or 0,
        "W": index_width,
        "J*W": (config.index_n_heads or 0) * index_width,
    }


def _facts(config: ModelConfig) -> set[str]:
    low_rank, bias = config.q_lora_rank is not None, config.attention_bias
    facts = {
        "always": True,
        "tied": config.tie_word_embeddings,
        "untied": not config.tie_word_embeddings,
        "low_rank_q": low_rank,
        "full_q": not low_rank,
        "attention_bias": bias,
        "low_rank_q_with_bias": low_rank and bias,
        "biased": config.topk_method == "noaux_tc",
        "shared": bool(config.n_shared_experts),
        "normed_mixture": config.family.norms_mixture,
    }
    return {name for name, holds in facts.items() if holds}
