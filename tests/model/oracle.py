"""Random small configurations, and transformers' own models carrying the same weights: the independent oracle."""

import random
from typing import Any

import torch
import transformers

from soli.config import ModelConfig
from soli.model import Transformer

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def draw_config(seed: int, **fixed: Any) -> ModelConfig:
    """A configuration of two to four layers: every feature on or off by the seed, unless fixed."""
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 4])
    yarn = rng.choice([None, YARN, {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}])
    drawn = {
        "model_type": "deepseek_v3",
        "vocab_size": 97,
        "hidden_size": rng.choice([32, 48]),
        "intermediate_size": 64,
        "moe_intermediate_size": rng.choice([16, 24]),
        "num_hidden_layers": rng.choice([2, 3, 4]),
        "first_k_dense_replace": rng.choice([0, 1, 2]),
        "num_attention_heads": rng.choice([2, 4]),
        "n_shared_experts": rng.choice([0, 1, 2]),
        "n_routed_experts": 8,
        "num_experts_per_tok": rng.choice([1, 2, 4]),
        "n_group": groups,
        "topk_group": max(1, groups // 2),
        "norm_topk_prob": rng.random() < 0.8,
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "q_lora_rank": rng.choice([None, 20]),
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": rng.choice([12, 20]),
        "rope_scaling": yarn,
        "rope_interleave": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.3,
        "max_position_embeddings": 128,
        "num_nextn_predict_layers": 0,
    }
    return ModelConfig.from_dict(drawn | fixed)


def draw_v2_config(seed: int) -> ModelConfig:
    """As draw_config with what V2 has: softmax scores, greedy or group-limited selection, no normalisation, no bias."""
    method = ["greedy", "group_limited_greedy"][seed % 2]
    return draw_config(
        seed,
        model_type="deepseek_v2",
        scoring_func="softmax",
        topk_method=method,
        norm_topk_prob=False,
        rope_interleave=True,
        n_shared_experts=1 + seed % 2,
        **({"n_group": 4, "topk_group": 2} if method == "group_limited_greedy" else {"n_group": 1, "topk_group": 1}),
    )


def draw_sparse_config(model_type: str, seed: int, **fixed: Any) -> ModelConfig:
    """As draw_config with sparse attention that selects a few of 40 tokens; GLM's layers may share a selection. With
    eight index heads no two scores are equal."""
    rng = random.Random(1000 + seed)
    is_glm = model_type == "glm_moe_dsa"
    layers = rng.choice([3, 4])
    shared = is_glm and seed % 3 > 0
    drawn = {
        "num_hidden_layers": layers,
        "q_lora_rank": rng.choice([20, 28]),
        "index_topk": rng.choice([3, 6, 11]),
        "index_n_heads": 8,
        "index_head_dim": rng.choice([8, 16]),
        "indexer_types": ["full", *rng.choices(["full", "shared"], k=layers - 2), "shared"] if shared else None,
        "indexer_rope_interleave": is_glm,
        "rope_interleave": True,
        "n_shared_experts": rng.choice([1, 2]),
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        **({"n_group": 1, "topk_group": 1} if is_glm else {}),
    }
    return draw_config(seed, model_type=model_type, **(drawn | fixed))


def make_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A float32 model whose weights are large enough, and biases uneven enough, for every part to matter."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5.0)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for _, moe in model.moe_layers():
            if moe.gate.e_score_correction_bias is not None:
                moe.gate.e_score_correction_bias.normal_(0.0, 0.3, generator=generator)
    return model


# What the files of each family say beside the fields that draw_config draws, None: a field that they do not have.
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "kimi_k2": {"n_group": 1, "topk_group": 1},
    "glm4_moe_lite": {"rms_norm_eps": 1e-5},
    "sarvam_mla": {"q_lora_rank": None, "initializer_range": 0.006},
    "youtu": {"tie_word_embeddings": True, "n_routed_experts": 0, "n_shared_experts": 0},
    "axk1": {"q_lora_rank": 20},
    "mistral4": {"scoring_func": "softmax", "topk_method": "group_limited_greedy"},
}


def draw_family_config(model_type: str, seed: int) -> ModelConfig:
    """As draw_config, a small model of another family. transformers' shared experts need one at least."""
    rng = random.Random(seed)
    fixed = dict(FAMILY_FIELDS[model_type])
    if fixed.get("n_routed_experts") != 0:
        fixed["n_shared_experts"] = rng.choice([1, 2])
    if model_type == "mistral4":
        beta = {"llama_4_scaling_beta": rng.choice([0.1, 0.5]), "original_max_position_embeddings": rng.choice([8, 16])}
        fixed["rope_scaling"] = {**rng.choice([YARN, {**YARN, "mscale": 0.7}]), **beta}
    if model_type == "sarvam_mla":
        fixed["rope_scaling"] = rng.choice([None, {**YARN, "type": "deepseek_yarn"}])
    return draw_config(seed, model_type=model_type, **fixed)


def oracle_of(model: Transformer) -> torch.nn.Module:
    """The transformers model of the same configuration, holding copies of the same weights; MTP is left out."""
    fields = model.config.to_dict()
    model_type = fields.pop("model_type")
    config = transformers.AutoConfig.for_model(model_type.replace("kimi_k2", "deepseek_v3"), **fields)
    # transformers computes sarvam_mla with DeepSeek-V3's class.
    network = getattr(transformers, model.config.family.architecture, transformers.DeepseekV3ForCausalLM)
    oracle = network(config)
    state = {
        name if name.startswith("lm_head") else f"model.{oracle_name(name)}": tensor.clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith("mtp.")
    }
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    # A width-0 shared expert has weights of no elements there, and no weights here.
    assert not unexpected and all("shared_experts" in name for name in missing), (missing, unexpected)
    return oracle.float().train(False)


def oracle_name(name: str) -> str:
    """A parameter's name in transformers' module."""
    return name.replace(".post_mlp_layernorm", ".mlp.post_mlp_layernorm")
