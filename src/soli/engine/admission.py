"""What could never run is refused before it waits: empty or too long prompts, more tokens than the cache holds, mutes
that leave a router too few experts."""

from collections.abc import Mapping

from soli.engine.latent_cache import pages_for
from soli.engine.request import EngineLimits, Refused, Request
from soli.engine.text_model import TextModel
from soli.model.moe import MoE


def mixture_layers(text_model: TextModel) -> dict[int, MoE]:
    """The main model's mixture layers by their number."""
    layers = enumerate(text_model.model.layers)
    return {at: block.mlp for at, block in layers if isinstance(block.mlp, MoE)}


def check(request: Request, text_model: TextModel, limits: EngineLimits, pages: int) -> None:
    """Refused, with the field of the request that is to blame; `pages` are all that the cache has."""
    prompt, limit, vocab = request.prompt_ids, request.max_new_tokens, text_model.model.config.vocab_size
    if not prompt:
        raise Refused("prompt_ids", "the prompt is empty: give it at least one token")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise Refused(
            "prompt_ids", f"the prompt holds token {max(prompt)}, but the model's vocabulary ends at {vocab - 1}"
        )
    if limit < 1:
        raise Refused("max_new_tokens", f"max_new_tokens is {limit}: ask for at least 1")
    together = f"the prompt has {len(prompt)} tokens and asks for {limit} more"
    if len(prompt) + limit > text_model.positions:
        raise Refused(
            "max_new_tokens",
            f"{together}, but the model has only {text_model.positions} positions: shorten the text or ask for fewer "
            "tokens",
            too_long=True,
        )
    if pages_for(len(prompt) + limit, limits.page_tokens) > pages:
        raise Refused(
            "max_new_tokens",
            f"{together}, but the cache of {limits.cache_bytes} bytes holds {pages} pages of {limits.page_tokens}: "
            "shorten the text, ask for fewer tokens or give the engine more cache_bytes",
        )
    muted: dict[int, set[int]] = {}
    for layer, expert in request.muted:
        muted.setdefault(layer, set()).add(expert)
    _check_mutes(muted, mixture_layers(text_model))


def _check_mutes(muted: Mapping[int, set[int]], moes: Mapping[int, MoE]) -> None:
    for layer, experts in muted.items():
        if layer not in moes:
            raise Refused("muted", f"layer {layer} has no routed experts to mute; those with are {sorted(moes)}")
        gate = moes[layer].gate
        E = gate.weight.shape[0]
        if not 0 <= min(experts) <= max(experts) < E:
            raise Refused(
                "muted", f"expert {max(experts)} of layer {layer} cannot be muted: there are experts 0 to {E - 1}"
            )
        group = E // gate.G
        left = sorted(sum(e not in experts for e in range(at, at + group)) for at in range(0, E, group))
        if sum(left[: gate.kept_groups]) < gate.K:  # whichever groups survive
            raise Refused(
                "muted",
                f"{len(experts)} experts of layer {layer} are muted, which may leave fewer than the {gate.K} that "
                "play: mute fewer",
            )
