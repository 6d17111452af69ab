"""What a configuration must satisfy, each rule a sentence: the field, its value, and what would mend it.

Rules are checked once, at construction of `ModelConfig` and `RopeScaling`; later code may rely on them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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

# Fields that would change the network if they held anything else; Soli has no such variant.
ONLY = {"mlp_bias": False, "use_mla": True}


def require(d: Mapping[str, Any], where: str, names: tuple[str, ...]) -> None:
    """SoliError for the first of `names` that `d` lacks."""
    for name in names:
        if d.get(name) is None:
            raise SoliError(f"{where} has no {name}; yarn needs it")


def settle_floats(config: Any) -> None:
    """Whole numbers in float fields (`rope_theta: 10000`) become floats, so that equal configurations compare and print alike."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type == "float" and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(config, f.name, float(value))


def check_types(config: Any, where: str = "") -> None:
    """Every field holds what its annotation says; a bool is not a whole number, a float is finite."""
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), str(f.type)
        name = where + f.name
        if value is None and "None" in kind:
            continue
        if kind.startswith("int"):
            is_list = "list" in kind and isinstance(value, list)
            if not all(type(v) is int for v in (value if is_list else [value])):
                raise SoliError(f"{name} is {value!r}; it must be a whole number")
        elif kind == "float" and (type(value) is not float or not math.isfinite(value)):
            raise SoliError(f"{name} is {value!r}; it must be a finite number")
        elif kind == "bool" and type(value) is not bool:
            raise SoliError(f"{name} is {value!r}; it must be true or false")
        elif kind == "str" and type(value) is not str:
            raise SoliError(f"{name} is {value!r}; it must be a string")
        elif kind.startswith("dict") and not isinstance(value, dict):
            raise SoliError(f"{name} is {value!r}; it must be a JSON object")


def check_rope_scaling(rope: RopeScaling) -> None:
    """Only YaRN, with a factor that stretches and a known original length."""
    if rope.type != "yarn":
        raise SoliError(f"rope_scaling type is {rope.type!r}; Soli knows 'yarn', or null for none")
    check_types(rope, "rope_scaling.")
    if rope.factor < 1:
        raise SoliError(f"rope_scaling.factor is {rope.factor}; it stretches the context and must be 1 or more")
    if rope.original_max_position_embeddings < 1:
        length = rope.original_max_position_embeddings
        raise SoliError(f"rope_scaling.original_max_position_embeddings is {length}; it must be positive")
    if rope.beta_fast < rope.beta_slow or rope.beta_slow <= 0:
        raise SoliError(
            f"rope_scaling.beta_fast is {rope.beta_fast} and beta_slow {rope.beta_slow}; beta_fast >= beta_slow > 0 must hold"
        )
    if rope.mscale < 0 or rope.mscale_all_dim < 0:
        raise SoliError(f"rope_scaling.mscale is {rope.mscale} and mscale_all_dim {rope.mscale_all_dim}; neither may be negative")
    for name, neutral in (("attention_factor", None), ("truncate", True)):
        if rope.extra.get(name, neutral) not in (neutral, None):
            raise SoliError(f"rope_scaling.{name} is {rope.extra[name]!r}, which Soli does not apply; remove it")


def check_model(config: ModelConfig) -> None:
    """All rules of a model configuration; the first that fails speaks."""
    check_types(config)
    for name in POSITIVE:
        if getattr(config, name) <= 0:
            raise SoliError(f"{name} is {getattr(config, name)}; it must be positive")
    for name in NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise SoliError(f"{name} is {getattr(config, name)}; it must not be negative")
    _check_fixed(config)
    _check_attention(config)
    _check_tokens(config)
    if config.n_routed_experts:
        _check_routing(config)


def _check_fixed(config: ModelConfig) -> None:
    if config.hidden_act != "silu":
        raise SoliError(f"hidden_act is {config.hidden_act!r}; the family uses 'silu' alone")
    for name, only in ONLY.items():
        if config.extra.get(name, only) not in (only, None):
            raise SoliError(f"{name} is {config.extra[name]!r}, a variant that Soli does not have; it must be {only!r}")
    if config.first_k_dense_replace > config.num_hidden_layers:
        raise SoliError(
            f"first_k_dense_replace is {config.first_k_dense_replace}, more than num_hidden_layers {config.num_hidden_layers}; "
            "it counts the dense layers at the start"
        )
    if config.attention_dropout >= 1:
        raise SoliError(f"attention_dropout is {config.attention_dropout}; it must be below 1")


def _check_attention(config: ModelConfig) -> None:
    if config.qk_rope_head_dim % 2:
        raise SoliError(f"qk_rope_head_dim is {config.qk_rope_head_dim}; it must be even, because RoPE turns pairs")
    if config.q_lora_rank is not None and config.q_lora_rank <= 0:
        raise SoliError(f"q_lora_rank is {config.q_lora_rank}; it must be positive, or null for a full query projection")
    if config.num_key_value_heads != config.num_attention_heads:
        raise SoliError(
            f"num_key_value_heads is {config.num_key_value_heads} but num_attention_heads is {config.num_attention_heads}; "
            "latent attention has one key per head, so make them equal"
        )


def _check_tokens(config: ModelConfig) -> None:
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for name, values in (("bos_token_id", [config.bos_token_id]), ("eos_token_id", eos), ("pad_token_id", [config.pad_token_id])):
        for value in values:
            if value is not None and not -1 <= value < config.vocab_size:
                raise SoliError(f"{name} is {value}, outside the vocabulary of {config.vocab_size} (vocab_size)")


def _check_routing(config: ModelConfig) -> None:
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    if config.scoring_func not in SCORING:
        raise SoliError(f"scoring_func is {config.scoring_func!r}; it must be one of {', '.join(SCORING)}")
    if config.topk_method not in METHODS:
        raise SoliError(f"topk_method is {config.topk_method!r}; it must be one of {', '.join(METHODS)}")
    if chosen < 1:
        raise SoliError(f"num_experts_per_tok is {chosen}; with {experts} routed experts each token must choose at least one")
    if chosen > experts:
        raise SoliError(f"num_experts_per_tok is {chosen}, more than n_routed_experts {experts}; choose at most {experts}")
    if config.moe_intermediate_size < 1:
        raise SoliError(f"moe_intermediate_size is {config.moe_intermediate_size}; routed experts need a positive width")
    if config.topk_method != "greedy":
        _check_groups(config)


def _check_groups(config: ModelConfig) -> None:
    experts, groups, kept = config.n_routed_experts, config.n_group, config.topk_group
    if experts % groups:
        raise SoliError(f"n_group is {groups}, which does not divide n_routed_experts {experts}; choose a divisor, or 1 for no groups")
    if kept > groups:
        raise SoliError(f"topk_group is {kept}, more than n_group {groups}; at most {groups} groups can survive")
    size = experts // groups
    if kept * size < config.num_experts_per_tok:
        raise SoliError(
            f"topk_group {kept} leaves {kept * size} experts ({size} per group) but num_experts_per_tok is "
            f"{config.num_experts_per_tok}; let more groups survive or choose fewer experts"
        )
    if config.topk_method == "noaux_tc" and groups > 1 and size < 2:
        raise SoliError(
            f"n_group is {groups} for {experts} experts; noaux_tc ranks a group by its two best experts, "
            "so a group needs at least two"
        )
