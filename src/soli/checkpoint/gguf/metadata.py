"""The keys of a GGUF file of architecture `deepseek2`, and what llama.cpp cannot compute, rejected by name."""

from pathlib import Path
from typing import Any, Final

from soli.config import ModelConfig
from soli.errors import SoliError
from soli.input_files import read_object_if_present, read_text
from soli.sections import shown

ARCHITECTURE: Final = "deepseek2"
LITE_LAYERS: Final = (26, 27)  # with so many layers llama.cpp takes a model for V2-Lite, which has no q_lora


def check_config(config: ModelConfig) -> None:
    """SoliError naming the first field whose value llama.cpp does not compute."""
    is_mixture, yarn = bool(config.n_routed_experts), config.rope_scaling
    grouped = is_mixture and config.n_group > 1
    rules = (
        ("model_type", config.family.norms_mixture),
        ("llama_4_scaling", config.llama_4_scaling is not None),
        ("index_topk", config.index_topk is not None),
        ("attention_bias", config.attention_bias),
        ("rope_interleave", not config.rope_interleave),
        ("moe_layer_freq", is_mixture and config.moe_layer_freq != 1),
        ("n_shared_experts", is_mixture and not config.n_shared_experts),
        ("topk_method", grouped and config.topk_method == "group_limited_greedy"),
        ("q_lora_rank", config.q_lora_rank is not None and config.num_hidden_layers in LITE_LAYERS),
    )
    for name, is_unknown in rules:
        if is_unknown:
            raise SoliError(f"{name} is {shown(getattr(config, name))}, which llama.cpp does not compute for deepseek2")
    if yarn is not None and yarn.mscale != yarn.mscale_all_dim and (yarn.mscale, yarn.mscale_all_dim) != (1, 0):
        raise SoliError(
            f"rope_scaling.mscale is {yarn.mscale} and mscale_all_dim {yarn.mscale_all_dim}; llama.cpp computes only "
            "equal ones, or 1 and 0"
        )


def add_shape(writer: Any, config: ModelConfig) -> None:
    """The architecture's keys; `writer` is a gguf.GGUFWriter."""
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)  # absorbed: all heads attend to one latent
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    _add_rope(writer, config)
    _add_mixture(writer, config)


def _add_rope(writer: Any, config: ModelConfig) -> None:
    import gguf

    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    yarn = config.rope_scaling
    if yarn is None:
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
    writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)  # llama.cpp divides by 0.1 for this architecture


def _add_mixture(writer: Any, config: ModelConfig) -> None:
    import gguf

    if not config.n_routed_experts:
        writer.add_leading_dense_block_count(config.num_hidden_layers)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_expert_shared_count(0)
        return
    functions = gguf.ExpertGatingFuncType
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(functions.SIGMOID if config.scoring_func == "sigmoid" else functions.SOFTMAX)
    if config.topk_method != "greedy" and config.n_group > 1:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def read_chat_template(folder: Path) -> str | None:
    """The folder's chat template, the default one where it has several."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    template = read_object_if_present(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None
