"""Requests that could never run are rejected before they wait: empty or too long prompts, more tokens than the cache
holds, masked experts that leave a router too few."""

from collections.abc import Mapping

from soli.engine.latent_cache import blocks_for
from soli.engine.request import EngineLimits, RejectedRequest, Request
from soli.engine.text_model import TextModel
from soli.model.moe import MoE
from soli.model.transformer import find_mixture


def mixture_layers(text_model: TextModel) -> dict[int, MoE]:
    """The main model's mixture layers by their number."""
    mixtures = {layer: find_mixture(block) for layer, block in enumerate(text_model.model.layers)}
    return {layer: mixture for layer, mixture in mixtures.items() if mixture is not None}


def check_request(request: Request, text_model: TextModel, limits: EngineLimits, block_count: int) -> None:
    """RejectedRequest, with the field of the request that is to blame. `block_count`: of the whole cache."""
    prompt, limit, vocab = request.prompt_ids, request.max_new_tokens, text_model.model.config.vocab_size
    if not prompt:
        raise RejectedRequest("prompt_ids", "the prompt is empty: give it at least one token")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise RejectedRequest(
            "prompt_ids", f"the prompt holds token {max(prompt)}, but the model's vocabulary ends at {vocab - 1}"
        )
    if limit < 1:
        raise RejectedRequest("max_new_tokens", f"max_new_tokens is {limit}: ask for at least 1")
    together = f"the prompt has {len(prompt)} tokens and asks for {limit} more"
    if len(prompt) + limit > text_model.positions:
        raise RejectedRequest(
            "max_new_tokens",
            f"{together}, but the model has only {text_model.positions} positions: shorten the text or ask for fewer "
            "tokens",
            too_long=True,
        )
    if blocks_for(len(prompt) + limit, limits.block_size) > block_count:
        raise RejectedRequest(
            "max_new_tokens",
            f"{together}, but the cache of {limits.cache_bytes} bytes holds {block_count} blocks of "
            f"{limits.block_size} tokens: shorten the text, ask for fewer tokens or give the engine more cache_bytes",
        )
    if not request.masked_experts:
        return
    masked_experts: dict[int, set[int]] = {}
    for layer, expert in request.masked_experts:
        masked_experts.setdefault(layer, set()).add(expert)
    _check_masked_experts(masked_experts, mixture_layers(text_model))


def _check_masked_experts(masked_experts: Mapping[int, set[int]], moes: Mapping[int, MoE]) -> None:
    for layer, experts in masked_experts.items():
        if layer not in moes:
            raise RejectedRequest(
                "masked_experts", f"layer {layer} has no routed experts to mask; those with are {sorted(moes)}"
            )
        gate = moes[layer].gate
        E = gate.weight.shape[0]
        if not 0 <= min(experts) <= max(experts) < E:
            raise RejectedRequest(
                "masked_experts",
                f"expert {max(experts)} of layer {layer} cannot be masked: there are experts 0 to {E - 1}",
            )
        group = E // gate.G
        remaining = sorted(sum(e not in experts for e in range(at, at + group)) for at in range(0, E, group))
        if sum(remaining[: gate.kept_groups]) < gate.K:  # whichever groups survive
            raise RejectedRequest(
                "masked_experts",
                f"{len(experts)} experts of layer {layer} are masked, which may leave fewer than the {gate.K} that are "
                "selected for a token: mask fewer",
            )
