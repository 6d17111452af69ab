"""Fields of relatives' configurations that change the network and that Soli does not compute: rejected by name.

Each stands here with its neutral values, with which it changes nothing; null, an empty list and an empty object are
neutral always. A top-level field that is neither here nor in ModelConfig has no effect on the network, as far as is
known, and is ignored. Inside the rope tables every field counts: an unknown one is rejected.
"""

from collections.abc import Mapping
from typing import Any, Final

from soli.errors import SoliError
from soli.sections import reject, shown

OFF: Final = (False, 0)
ONE: Final = (1,)
NONE: Final = ()  # only null and empty values are neutral

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    # positions
    "partial_rotary_factor": ONE, "rotary_pct": ONE, "rope_ratio": ONE, "use_rope": (True,), "alibi": OFF,
    "position_embedding_type": ("rope", "rotary"), "no_rope_layers": NONE, "no_rope_layer_interval": OFF,
    "nope_layer_interval": OFF, "rope_local_base_freq": NONE, "use_dynamic_ntk": OFF, "use_logn_attn": OFF,
    "mrope_section": NONE,
    # what attends to what, and how strongly
    "use_mla": (True,), "llama_4_scaling_beta": OFF, "attn_temperature_tuning": OFF,
    "attention_chunk_size": OFF, "is_causal": (True,), "use_bidirectional_attention": OFF, "add_cross_attention": OFF,
    "attn_logit_softcapping": OFF, "attn_logit_softcap": OFF, "query_pre_attn_scalar": NONE,
    "attention_multiplier": NONE, "attention_sinks": OFF, "use_attention_sinks": OFF, "attn_output_gate": OFF,
    "attention_output_gate": OFF, "gated_attention": OFF, "use_gated_attention": OFF, "clip_qkv": OFF,
    "sparse_attention_config": NONE, "linear_attn_config": NONE, "use_short_conv": OFF,
    "qk_layernorm": OFF, "use_qk_layernorm": OFF, "qk_norm": OFF, "use_qk_norm": OFF,
    "linear_head_dim": OFF, "linear_num_heads": OFF, "linear_conv_kernel_dim": OFF, "short_conv_kernel_size": OFF,
    "index_kpool": ONE, "kv_source_layers": NONE, "compress_rates": NONE, "compress_rope_theta": NONE,
    "mla_scale_q_lora": OFF, "mla_scale_kv_lora": OFF, "mla_use_nope": OFF, "learnable_sink_init": OFF,
    # biases
    "mlp_bias": OFF, "qkv_bias": OFF, "use_qkv_bias": OFF, "add_qkv_bias": OFF, "attention_out_bias": OFF,
    "use_bias": OFF, "add_bias_linear": OFF, "lm_head_bias": OFF,
    # factors and limits on activations
    "embedding_multiplier": ONE, "residual_multiplier": ONE, "logits_scaling": ONE, "logit_scale": ONE,
    "lm_head_multiplier": ONE, "scale_emb": ONE, "scale_depth": NONE, "dim_model_base": NONE, "use_mup": OFF,
    "final_logit_softcapping": OFF, "logits_soft_cap": OFF, "swiglu_limit": OFF, "swiglu_alpha": ONE,
    # blocks
    "hidden_activation": ("silu", "swish"), "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"), "sandwich_norm": OFF,
    "use_sandwich_norm": OFF, "post_norm": OFF, "use_post_norm": OFF, "parallel_attn": OFF,
    "use_parallel_residual": OFF, "apply_layernorm_1p": OFF, "hc_mult": ONE, "compress_ratios": NONE,
    "o_lora_rank": OFF, "gated_norm_rank": OFF, "ngram_vocab_size_ratio": OFF, "engram_config": NONE,
    # the mixture
    "zero_expert_num": OFF, "num_hash_layers": OFF, "moe_latent_size": OFF, "router_logit_softcapping": OFF,
    "moe_router_logit_softcapping": OFF, "mlp_only_layers": NONE, "decoder_sparse_step": ONE,
    "interleave_moe_layer_step": ONE, "moe_layer_interval": ONE, "zero_expert_type": NONE,
}  # fmt: skip

# Inside rope_scaling and rope_parameters, whatever the type.
ROPE_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "partial_rotary_factor": ONE, "llama_4_scaling": NONE, "llama_4_scaling_beta": OFF, "mrope_section": NONE,
}  # fmt: skip

# Inside the tables of type yarn.
YARN_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = ROPE_NEUTRAL | {
    "attn_factor": ONE, "extrapolation_factor": ONE, "truncate": (True,), "apply_yarn_scaling": (True,),
}  # fmt: skip

# Parameters of other types, and remarks, which no type that Soli knows computes with.
ROPE_WITHOUT_EFFECT: Final = (
    "finetuned", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "short_mscale", "long_mscale",
    "max_position_embeddings",
)  # fmt: skip


def reject_variants(extra: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], prefix: str = "") -> None:
    """SoliError for the first field of `neutral` with which `extra` asks for a network that Soli does not compute."""
    for name, values in neutral.items():
        value = extra.get(name)
        if not is_empty(value) and value not in values:
            examples = [example for example in values if isinstance(example, bool) == isinstance(value, bool)] or values
            remedy = f"remove it or set {examples[0]!r}" if examples else "remove it"
            reject(prefix + name, value, f"Soli has no such variant; {remedy}")


def reject_contradictions(extra: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """SoliError for a field of `extra` that says again, by another name, what Soli computes, and says otherwise."""
    for name, value in computed.items():
        if not is_empty(extra.get(name)) and extra[name] != value:
            raise SoliError(
                f"{name} is {shown(extra[name])}, but by the other fields it is {shown(value)}; correct one of them"
            )


def is_empty(value: Any) -> bool:
    """Whether a value is null or has no items."""
    return value is None or (isinstance(value, list | dict | str) and not value)
