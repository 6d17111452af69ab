"""The one table of model families: for each `model_type`, what it changes of DeepSeek-V3's network and its files.

There is one network. Each field of `ModelFamily` is one difference, which the configuration, the model, the name map or
the C++ path reads; of many families only the meaning of absent fields differs. What a configuration says by itself
(`scoring_func`, `q_lora_rank`, `rope_interleave`, ...) is not here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True)
class ModelFamily:
    """What one `model_type` changes. The defaults are those of `deepseek_v3`."""

    architecture: str = "DeepseekV3ForCausalLM"  # of config.json's `architectures`
    defaults: Mapping[str, Any] = field(default_factory=dict)  # an absent field; of the others ModelConfig's default
    sparse_attention: bool = False  # DSA: an indexer selects the tokens that attention reads
    stacks_experts: bool = False  # its other readers know an expert's weights in stacks alone, where these are bf16
    writes_layer_types: bool = False  # its readers know `mlp_layer_types` instead of `first_k_dense_replace`
    text_config: str = ""  # the field that has the configuration of the text model, in a model of more than text
    text_model_type: str = ""  # the text model's type, where its configuration has none
    tensor_prefixes: Mapping[str, str] = field(default_factory=dict)  # of its tensors' names -> of the text model's
    left_out: tuple[str, ...] = ()  # prefixes of tensors that the text model does not have
    rope_parameters: Mapping[str, Any] | None = None  # of a file without any; its table has `llama_4_scaling_beta` too
    is_dense: bool = False  # no mixture in any layer
    norms_mixture: bool = False  # `post_mlp_layernorm` on the output of a mixture
    may_lack_router_biases: bool = False  # the files decide, not topk_method: without, scores alone select
    ranks_groups_by_pairs: bool = False  # a group counts by its two best experts even where there is no router bias
    ignored_tensors: tuple[str, ...] = ()  # patterns of tensors that published files hold and nothing uses
    renamed_tensors: Mapping[str, str] = field(default_factory=dict)  # ends of names that transformers writes
    ignored_fields: tuple[str, ...] = ()  # of its config.json, without effect in its published code


SOFTMAX_ROUTER: Final = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
ONE_GROUP: Final = {"n_group": 1, "topk_group": 1}
INDEXER: Final = {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128, "indexer_rope_interleave": False}

FAMILIES: Final[Mapping[str, ModelFamily]] = {
    "deepseek_v3": ModelFamily(),
    "kimi_k2": ModelFamily(),
    "kimi_k25": ModelFamily(
        text_config="text_config",
        text_model_type="kimi_k2",
        # As published, and as transformers names them.
        tensor_prefixes={"language_model.": "", "model.language_model.": "model."},
        left_out=("vision_tower.", "mm_projector.", "model.vision_tower.", "model.mm_projector."),
    ),
    "deepseek_v2": ModelFamily(
        architecture="DeepseekV2ForCausalLM",
        defaults={
            "vocab_size": 102400,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "moe_intermediate_size": 1407,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 0,
            "first_k_dense_replace": 0,
            "topk_method": "greedy",
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **ONE_GROUP,
            **SOFTMAX_ROUTER,
        },
    ),
    "glm4_moe_lite": ModelFamily(
        architecture="Glm4MoeLiteForCausalLM",
        writes_layer_types=True,
        defaults={
            "vocab_size": 154880,
            "hidden_size": 2048,
            "intermediate_size": 10240,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 47,
            "num_attention_heads": 20,
            "n_routed_experts": 64,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.8,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
            **ONE_GROUP,
        },
    ),
    "deepseek_v32": ModelFamily(
        architecture="DeepseekV32ForCausalLM",
        sparse_attention=True,
        defaults={"max_position_embeddings": 163840, **INDEXER},
    ),
    "glm_moe_dsa": ModelFamily(
        architecture="GlmMoeDsaForCausalLM",
        sparse_attention=True,
        defaults={
            "vocab_size": 154880,
            "hidden_size": 6144,
            "intermediate_size": 12288,
            "num_hidden_layers": 78,
            "num_attention_heads": 64,
            "q_lora_rank": 2048,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
            **INDEXER,
            "index_n_heads": 32,
            "indexer_rope_interleave": True,
            **ONE_GROUP,
        },
    ),
    "sarvam_mla": ModelFamily(
        architecture="SarvamMLAForCausalLM",
        ignored_fields=("use_qk_norm",),  # the norms of the latents
        defaults={
            "vocab_size": 262144,
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 64,
            "n_routed_experts": 128,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "initializer_range": 0.006,
            **ONE_GROUP,
        },
    ),
    "youtu": ModelFamily(
        architecture="YoutuForCausalLM",
        is_dense=True,
        defaults={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "n_routed_experts": 0,
            "n_shared_experts": 0,
            "first_k_dense_replace": 0,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    "axk1": ModelFamily(
        architecture="AXK1ForCausalLM",
        writes_layer_types=True,
        norms_mixture=True,
        may_lack_router_biases=True,
        ranks_groups_by_pairs=True,
        ignored_tensors=("model.layers.*.post_mlp_layernorm.weight",),  # of the dense layers
        renamed_tensors={".mlp.post_mlp_layernorm.weight": ".post_mlp_layernorm.weight"},
        defaults={
            "vocab_size": 163840,
            "num_attention_heads": 64,
            "n_routed_experts": 192,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 32768,
            "bos_token_id": 163691,
            "eos_token_id": 163691,
        },
    ),
    "mistral4": ModelFamily(  # Mistral Small 4, and Mistral Large 3 in Hugging Face's names
        architecture="Mistral4ForCausalLM",
        stacks_experts=True,
        ranks_groups_by_pairs=True,
        rope_parameters={
            "type": "yarn",
            "rope_theta": 10000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        defaults={
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "n_routed_experts": 128,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 0,
            "topk_method": "group_limited_greedy",
            "q_lora_rank": 1024,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "max_position_embeddings": 1048576,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 11,
            **ONE_GROUP,
            **SOFTMAX_ROUTER,
            "norm_topk_prob": True,
        },
    ),
    "mistral3": ModelFamily(  # the published folder of Mistral Small 4; others hold another text model
        text_config="text_config",
        text_model_type="mistral",
        tensor_prefixes={"language_model.": "", "model.language_model.": "model."},
        left_out=(
            *("vision_tower.", "multi_modal_projector."),
            *("model.vision_tower.", "model.multi_modal_projector."),
        ),
    ),
}

# Other spellings of a model_type.
MODEL_TYPES: Final[Mapping[str, str]] = {"AXK1": "axk1"}

# Relatives that are other networks, and how: rejected by name.
OTHER_NETWORKS: Final[Mapping[str, str]] = {
    "minicpm3": "MiniCPM3 scales embedding, residual stream and logits, and rotates in halves",
    "axk2": "A.X-K2 has norms with gates",
    "deepseek_v4": "DeepSeek-V4 has another attention and hyper-connections",
    "kimi_linear": "Kimi Linear has layers of linear attention",
    "longcat_flash": "LongCat-Flash has two attentions in a layer and experts that compute nothing",
    "mistral_large4": "Mistral Large 4 has another attention",
    "glm5_next": "GLM-5.3-Flash has another attention",
}

# Other writers' names for a field; both may be present when they agree.
ALIASES: Final = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}

# A null in these means "none of it"; in any other field that cannot be null it means the same as an absent field.
NULL_MEANS: Final = {
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "num_nextn_predict_layers": 0,
    "n_group": 1,
    "topk_group": 1,
}

# Written by some libraries but derived from other fields: dropped, so that a changed copy cannot contradict itself.
DERIVED: Final = ("head_dim", "qk_head_dim", "q_head_dim")
