"""Small random models of every kind that decoding must agree on, and a toy folder that translates nonsense."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from soli.config import ModelConfig
from soli.data.tokenizer import Tokenizer
from soli.engine.text_model import TextModel, text_model
from soli.model.transformer import Transformer

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
BASE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 1,
    "eos_token_id": 1,
}
V2 = {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
# Index heads are many, so that no two scores are zero; texts are longer than what is selected.
SPARSE = {"index_topk": 6, "index_n_heads": 8, "index_head_dim": 12}
GLM = {"model_type": "glm_moe_dsa", "n_group": 1, "topk_group": 1}
SPARSE_KINDS: dict[str, dict[str, Any]] = {
    "v3.2": {"model_type": "deepseek_v32"} | SPARSE,
    "glm with shared indexers": GLM | SPARSE | {"indexer_types": ["full", "shared", "full"]},
}
KINDS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3 without q_lora or groups": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "v3 with yarn": {"rope_scaling": YARN},
    "v2 greedy": V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "v2 by groups": V2 | {"topk_method": "group_limited_greedy", "num_nextn_predict_layers": 0},
    "dense": {"n_routed_experts": 0, "num_nextn_predict_layers": 0},
    "a norm after the mixture": {"model_type": "axk1"},
    "queries scaled by position": {
        "model_type": "mistral4",
        "rope_parameters": {**YARN, "original_max_position_embeddings": 3, "llama_4_scaling_beta": 0.4},
    },
    **SPARSE_KINDS,
}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
# Of each family in soli.families one that has what the family changes.
FAMILY_KINDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": KINDS["v3 with yarn"],
    "kimi_k2": {"model_type": "kimi_k2", **ONE_GROUP},
    "deepseek_v2": KINDS["v2 by groups"],
    "glm4_moe_lite": {"model_type": "glm4_moe_lite", "rms_norm_eps": 1e-5, "v_head_dim": 16, **ONE_GROUP},
    "sarvam_mla": {
        "model_type": "sarvam_mla",
        "q_lora_rank": None,
        "rope_scaling": {**YARN, "type": "deepseek_yarn"},
        **ONE_GROUP,
    },
    "youtu": {
        "model_type": "youtu",
        "n_routed_experts": 0,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 0,
    },
    "axk1": KINDS["a norm after the mixture"],
    "mistral4": KINDS["queries scaled by position"],
    "deepseek_v32": SPARSE_KINDS["v3.2"],
    "glm_moe_dsa": SPARSE_KINDS["glm with shared indexers"],
}


@cache
def tiny_model(kind: str = "v3", **changes: Any) -> Transformer:
    """A float32 model with weights large enough for its parts, and its bias, to matter."""
    model = Transformer(ModelConfig.from_dict(BASE | (KINDS | FAMILY_KINDS)[kind] | changes)).eval()
    generator = torch.Generator().manual_seed(7)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(8.0)
        for _, moe in model.moe_layers():
            if moe.gate.e_score_correction_bias is not None:
                moe.gate.e_score_correction_bias.normal_(0.0, 0.2, generator=generator)
    return model


@cache
def tiny_tokenizer() -> Tokenizer:
    words = ["the cat sat on the mat", "hello world", "猫坐在垫子上", "你好世界", "今天天气很好"]
    return Tokenizer.train(words * 3, 330)


def tiny_text_model(kind: str = "v3") -> TextModel:
    """Translates and continues, nonsensically but deterministically."""
    return text_model(tiny_model(kind, vocab_size=330, max_position_embeddings=96), tiny_tokenizer())


def tiny_folder(folder: Path) -> str:
    """The same model as files."""
    from soli.checkpoint import save_model

    tiny_tokenizer().save(folder / "tokenizer")
    save_model(tiny_text_model().model, folder / "model", format="fp32", tokenizer_from=folder / "tokenizer")
    return str(folder / "model")
