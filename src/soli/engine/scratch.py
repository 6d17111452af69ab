"""How much memory a step of the engine takes beside weights and latent cache."""

from dataclasses import replace
from typing import Final

import torch

from soli.config import ModelConfig
from soli.engine.request import EngineLimits
from soli.kernels.cpu import fused

SCRATCH: Final = 128 << 20  # bytes of C++ scratch memory per call; more tokens go in several calls
MAX_TOKENS: Final = 512  # of a call; more are no faster
MIN_TOKENS: Final = 64  # of a call, whatever memory they take
MIN_STEP_TOKENS: Final = 16  # however little memory there is


def tokens_per_call(scratch: int, paged: bool = False) -> int:
    """Of the fused forward, where each takes so many bytes of scratch. Where experts are read from disk, as many as a
    step has, for each expert is read once per call: `limit_scratch` bounds the step."""
    return fused.MAX_TOKENS if paged else max(MIN_TOKENS, min(MAX_TOKENS, SCRATCH // scratch))


def token_bytes(config: ModelConfig) -> int:
    """Scratch of one token in the fused forward, of a layer with the most."""
    H, N, R, V = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    D, F, K = config.hidden_size, config.moe_intermediate_size or 0, config.num_experts_per_tok or 0
    dense = max(config.intermediate_size, F * (config.n_shared_experts or 0))
    selection = (config.index_topk or 0) + 2 * (config.index_n_heads or 0)
    return 4 * max(H * (2 * (N + R) + 2 * V) + selection + 4 * D, 2 * D + 2 * dense + K * (D + 2 * F))


def limit_scratch(
    config: ModelConfig, limits: EngineLimits, dtype: torch.dtype, free_bytes: int
) -> tuple[EngineLimits, int]:
    """The limits with steps of so few tokens that their scratch takes a quarter of `free_bytes`, those that weights
    leave, but at least MIN_STEP_TOKENS; and that scratch."""
    least_tokens = max(MIN_STEP_TOKENS, limits.max_running)
    while (scratch := step_bytes(config, limits, dtype)) > free_bytes // 4 and limits.tokens_per_step > least_tokens:
        limits = replace(limits, tokens_per_step=max(least_tokens, limits.tokens_per_step // 2))
    return limits, scratch


def step_bytes(config: ModelConfig, limits: EngineLimits, dtype: torch.dtype) -> int:
    """About what a step of `limits.tokens_per_step` tokens allocates where experts are read from disk: scratch of the
    fused forward, hidden states, the routers' decisions twice (in parts and joined), logits of all running requests
    with a copy for sampling."""
    E, K, T = config.n_routed_experts or 0, config.num_experts_per_tok or 0, limits.tokens_per_step
    each = token_bytes(config)
    call = min(T, tokens_per_call(each, paged=True)) * each
    routing = config.num_hidden_layers * T * (8 * E + 12 * K + config.n_group) if E else 0
    hidden = 4 * T * config.hidden_size * dtype.itemsize
    logits = 3 * limits.max_running * config.vocab_size * 4
    return call + 2 * routing + hidden + logits
