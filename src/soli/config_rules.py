"""What a configuration must satisfy, each rule a sentence: the field, its value, and what would mend it.

Rules are checked once, when a `ModelConfig` or `RopeScaling` is made; later code relies on them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from soli.errors import SoliError

if TYPE_CHECKING:
    from soli.config import ModelConfig, RopeScaling

SCORING = ("sigmoid", "softmax")
METHODS = ("noaux_tc", "greedy", "group_limited_greedy")

POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "moe_layer_freq",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings",
    "n_group", "topk_group", "rope_theta", "rms_norm_eps", "routed_scaling_factor",
)  # fmt: skip
NOT_NEGATIVE = (
    "num_nextn_predict_layers", "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "first_k_dense_replace",
    "moe_intermediate_size", "aux_loss_alpha", "attention_dropout", "initializer_range",
)  # fmt: skip

# Fields of relatives that would change the network if they held anything else; Soli has no such variant.
ONLY = {"mlp_bias": False, "use_mla": True, "qk_layernorm": False, "partial_rotary_factor": 1.0}
ONLY_ROPE = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}


def refuse(name: str, value: Any, why: str) -> NoReturn:
    """Raise the one kind of error here: field, value, reason with the mend."""
    raise SoliError(f"{name} is {value!r}; {why}")


def settle_floats(config: Any) -> None:
    """Whole numbers in float fields (`rope_theta: 10000`) become floats, so that equal configurations print alike."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type == "float" and type(value) is int:
            object.__setattr__(config, f.name, float(value))


def check_types(config: Any, where: str = "") -> None:
    """Every field holds what its annotation says: a bool is no whole number, a string no number, a float is finite."""
    for f in dataclasses.fields(config):
        value, kind, name = getattr(config, f.name), str(f.type), where + f.name
        if value is None and "None" in kind:
            continue
        if kind.startswith("int"):
            whole = isinstance(value, list) and "list" in kind and len(value) > 0
            if not all(type(v) is int for v in (value if whole else [value])):
                refuse(name, value, "it must be a whole number")
        elif kind == "float" and (type(value) is not float or not math.isfinite(value)):
            refuse(name, value, "it must be a finite number")
        elif kind == "bool" and type(value) is not bool:
            refuse(name, value, "it must be true or false")
        elif kind == "str" and type(value) is not str:
            refuse(name, value, "it must be a string")
        elif kind.startswith("dict") and not isinstance(value, dict):
            refuse(name, value, "it must be a JSON object")


def check_rope_scaling(rope: RopeScaling) -> None:
    """Only YaRN, with a factor that stretches and a known original length."""
    if rope.type != "yarn":
        refuse("rope_scaling.type", rope.type, "Soli knows 'yarn', and null for no scaling")
    check_types(rope, "rope_scaling.")
    if rope.factor < 1:
        refuse("rope_scaling.factor", rope.factor, "it stretches the context, so it must be 1 or more")
    if rope.original_max_position_embeddings < 1:
        length = rope.original_max_position_embeddings
        refuse("rope_scaling.original_max_position_embeddings", length, "it must be positive")
    if rope.beta_slow <= 0:
        refuse("rope_scaling.beta_slow", rope.beta_slow, "it must be positive")
    if rope.beta_fast < rope.beta_slow:
        refuse("rope_scaling.beta_fast", rope.beta_fast, f"it must be at least beta_slow, {rope.beta_slow}")
    for name in ("mscale", "mscale_all_dim"):
        if getattr(rope, name) < 0:
            refuse(f"rope_scaling.{name}", getattr(rope, name), "it must not be negative")
    _check_variants(rope.extra, ONLY_ROPE, "rope_scaling.")


def check_model(config: ModelConfig) -> None:
    """All rules of a model configuration; the first that fails speaks."""
    check_types(config)
    for name in POSITIVE:
        if getattr(config, name) <= 0:
            refuse(name, getattr(config, name), "it must be positive")
    for name in NOT_NEGATIVE:
        if getattr(config, name) < 0:
            refuse(name, getattr(config, name), "it must not be negative")
    _check_variants(config.extra, ONLY, "")
    _check_layers(config)
    _check_attention(config)
    _check_tokens(config)
    if config.n_routed_experts:
        _check_routing(config)


def _check_variants(extra: Mapping[str, Any], only: Mapping[str, Any], where: str) -> None:
    for name, value in only.items():
        if extra.get(name) not in (None, value):
            refuse(where + name, extra[name], f"Soli has no such variant; remove it or set {value!r}")


def _check_layers(config: ModelConfig) -> None:
    if config.hidden_act != "silu":
        refuse("hidden_act", config.hidden_act, "the family uses 'silu' alone")
    if config.first_k_dense_replace > config.num_hidden_layers:
        why = f"it counts dense layers at the start, so at most num_hidden_layers, {config.num_hidden_layers}"
        refuse("first_k_dense_replace", config.first_k_dense_replace, why)


def _check_attention(config: ModelConfig) -> None:
    if config.qk_rope_head_dim % 2:
        refuse("qk_rope_head_dim", config.qk_rope_head_dim, "RoPE turns pairs, so it must be even")
    if config.q_lora_rank is not None and config.q_lora_rank <= 0:
        refuse("q_lora_rank", config.q_lora_rank, "it must be positive, or null for a full query projection")
    if config.num_key_value_heads != config.num_attention_heads:
        why = (
            f"latent attention has one key per head, so it must equal num_attention_heads, {config.num_attention_heads}"
        )
        refuse("num_key_value_heads", config.num_key_value_heads, why)
    if config.attention_dropout >= 1:
        refuse("attention_dropout", config.attention_dropout, "it is a probability below 1")


def _check_tokens(config: ModelConfig) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not -1 <= token < config.vocab_size:
                refuse(name, token, f"tokens go from 0 to vocab_size - 1, {config.vocab_size - 1}")


def _check_routing(config: ModelConfig) -> None:
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    if config.scoring_func not in SCORING:
        refuse("scoring_func", config.scoring_func, f"it must be {' or '.join(SCORING)}")
    if config.topk_method not in METHODS:
        refuse("topk_method", config.topk_method, f"it must be one of {', '.join(METHODS)}")
    if chosen < 1:
        refuse("num_experts_per_tok", chosen, f"with {experts} routed experts each token must choose at least one")
    if chosen > experts:
        refuse("num_experts_per_tok", chosen, f"there are only {experts} experts (n_routed_experts) to choose from")
    if config.moe_intermediate_size < 1:
        refuse("moe_intermediate_size", config.moe_intermediate_size, "experts need a positive width")
    if config.topk_method != "greedy":
        _check_groups(config)


def _check_groups(config: ModelConfig) -> None:
    experts, groups, kept = config.n_routed_experts, config.n_group, config.topk_group
    size = experts // groups
    if experts % groups:
        refuse("n_group", groups, f"it must divide n_routed_experts, {experts}; 1 means no groups")
    if kept > groups:
        refuse("topk_group", kept, f"at most n_group, {groups}, groups can survive")
    if kept * size < config.num_experts_per_tok:
        why = (
            f"the surviving groups hold {kept * size} experts ({size} each), fewer than num_experts_per_tok, "
            f"{config.num_experts_per_tok}; let more groups survive or choose fewer experts"
        )
        refuse("topk_group", kept, why)
    if config.topk_method == "noaux_tc" and groups > 1 and size < 2:
        why = f"noaux_tc ranks a group by its two best experts, so {experts} experts make at most {experts // 2} groups"
        refuse("n_group", groups, why)
