"""Decoding: prompts in, tokens out, many requests at once.

The first pass reads all prompts as one flat sequence of tokens; every later pass reads one token per request with
absorbed attention over the latent cache (DeepSeek-V2 report, section 2.1.2). A finished request leaves the batch.
Without the cache every pass reads each sequence again from its beginning: slow, and the reference that the
cache is tested against. Refuses empty prompts and requests that could outgrow the model's positions.

Shapes: B requests still running, T tokens read in this pass, D hidden, V vocab.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from soli.engine.constraint import Constraint
from soli.engine.latent_cache import LatentCache
from soli.engine.logprobs import TokenLogprob
from soli.engine.sampler import GREEDY, Drawn, SamplerState, SamplingParams, sample
from soli.errors import SoliError
from soli.model.router import Routing
from soli.model.transformer import Transformer

OnToken = Callable[[int, int], bool | None]


@dataclass(frozen=True)
class Generation:
    """What one request produced.

    `ids`: the new tokens, without the stop token. `finish_reason`: "stop" (a stop token, or `on_token` said so) or
    "length". `routing`: if asked for, one Routing per MoE layer over the tokens the model read: the prompt, then
    `ids` (less the last one when no stop token followed it, for then nothing was read after it was drawn).
    `logprobs`: those of `ids`, if asked for.
    """

    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    routing: tuple[Routing, ...] | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass
class _Request:
    number: int
    ids: list[int]
    prompt_length: int
    max_new_tokens: int
    state: SamplerState
    read: int = 0
    finish_reason: Literal["stop", "length"] | None = None
    routing: list[tuple[Routing, ...]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def generation(self) -> Generation:
        routing = tuple(map(join_routing, zip(*self.routing, strict=True))) if self.routing else None
        ids = tuple(self.ids[self.prompt_length :])
        return Generation(ids, self.finish_reason or "length", routing, tuple(self.logprobs))


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    use_cache: bool = True,
    trace: bool = False,
    logprobs: int | None = None,
    constraints: Sequence[Constraint | None] | None = None,
) -> list[Generation]:
    """Continues every prompt (token ids) until a stop token, `max_new_tokens`, `on_token` or its constraint ends it.

    `max_new_tokens` and `sampling` hold for all prompts or are given one by one. `on_token(request, token)` is called
    for each new token (never for a stop token) and ends that request by returning True. `trace` keeps each read
    token's Routing, `logprobs` each new token's log-probability and so many alternatives. `constraints`: one freshly
    opened, or None, for each prompt. Results are in the order of `prompts`; they do not depend on what else is in the
    batch, nor (but for rounding) on the cache.
    """
    requests = _requests(model, prompts, max_new_tokens, sampling, constraints or [None] * len(prompts))
    cache = LatentCache.whole_rows([len(r.ids) + r.max_new_tokens for r in requests]) if use_cache else None
    running = [request for request in requests if request.max_new_tokens > 0]
    while running:
        logits_BV = _reread(model, running, trace) if cache is None else _read(model, running, cache, trace)
        tokens = sample(logits_BV, [request.state for request in running], [logprobs] * len(running))
        for request, drawn in zip(running, tokens, strict=True):
            if isinstance(drawn, SoliError):
                raise drawn
            _accept(request, drawn, stop_ids, on_token)
        running = [request for request in running if request.finish_reason is None]
    return [request.generation() for request in requests]


def _requests(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | Sequence[SamplingParams],
    constraints: Sequence[Constraint | None],
) -> list[_Request]:
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    positions, vocab = model.config.max_position_embeddings, model.config.vocab_size
    requests = []
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt:
            raise SoliError(f"prompt {number + 1} is empty: give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise SoliError(
                f"prompt {number + 1} holds token {max(prompt)}, but the model's vocabulary ends at {vocab - 1}"
            )
        if len(prompt) + limit > positions:
            raise SoliError(
                f"prompt {number + 1} has {len(prompt)} tokens and asks for {limit} more, but the model has only "
                f"{positions} positions: shorten the text or ask for fewer tokens"
            )
        state = SamplerState(params[number], prompt, vocab, constraints[number])
        requests.append(_Request(number, list(prompt), len(prompt), limit, state))
    return requests


def _read(model: Transformer, running: list[_Request], cache: LatentCache, trace: bool) -> Tensor:
    """Reads what each request has not read yet; logits (B,V) after its last token."""
    device = model.embed_tokens.weight.device
    new = [request.ids[request.read :] for request in running]
    ends = list(accumulate(map(len, new)))
    now = cache.begin([r.number for r in running], [r.read for r in running], [len(ids) for ids in new], device)
    ids_T = torch.tensor([token for ids in new for token in ids]).to(device)
    read = model.read(ids_T, now.positions_T, now, [end - 1 for end in ends])
    _note(running, ends, read.routing if trace else None)
    return read.logits_NV


def _reread(model: Transformer, running: list[_Request], trace: bool) -> Tensor:
    """The same without a cache: every request from its beginning."""
    device = model.embed_tokens.weight.device
    ids_BT, lengths_B = right_padded([request.ids for request in running], device)
    backbone = model.backbone(ids_BT)
    ends = [row * ids_BT.shape[1] + length for row, length in enumerate(lengths_B.tolist())]
    _note(running, ends, backbone.routing if trace else None)
    return model.head(backbone.hidden_BTD.flatten(0, 1)[torch.tensor(ends, device=device) - 1])


def _note(running: list[_Request], ends: Sequence[int], layers: Sequence[Routing] | None) -> None:
    """Each request's new tokens, which end at `ends` of the pass, are read; what the routers said of them is kept."""
    for request, end in zip(running, ends, strict=True):
        if layers is not None:
            start = end - len(request.ids) + request.read
            request.routing.append(tuple(slice_routing(layer, start, end) for layer in layers))
        request.read = len(request.ids)


def _accept(request: _Request, drawn: Drawn, stop_ids: Collection[int], on_token: OnToken | None) -> None:
    token = drawn.token
    if token in stop_ids:
        request.finish_reason = "stop"
        return
    request.ids.append(token)
    request.state.accept(token)
    if drawn.logprob is not None:
        request.logprobs.append(drawn.logprob)
    told_to_stop = on_token is not None and on_token(request.number, token)
    if told_to_stop or request.state.finished:
        request.finish_reason = "stop"
    elif len(request.ids) - request.prompt_length >= request.max_new_tokens:
        request.finish_reason = "length"


def right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B,T), zeros after each row's end, and the lengths (B). Pads come last: causality hides them."""
    lengths = [len(sequence) for sequence in sequences]
    ids_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return ids_BT.to(device), torch.tensor(lengths, device=device)


def slice_routing(routing: Routing, start: int, stop: int) -> Routing:
    """The decisions for tokens start..stop-1, copied so that the pass they came from can be freed."""
    groups_TG = routing.groups_TG
    return Routing(
        expert_ids_TK=routing.expert_ids_TK[start:stop].clone(),
        weights_TK=routing.weights_TK[start:stop].clone(),
        scores_TE=routing.scores_TE[start:stop].clone(),
        biased_TE=routing.biased_TE[start:stop].clone(),
        groups_TG=None if groups_TG is None else groups_TG[start:stop].clone(),
    )


def join_routing(parts: Sequence[Routing]) -> Routing:
    """One layer's decisions over consecutive tokens as one Routing."""
    groups = [part.groups_TG for part in parts if part.groups_TG is not None]
    return Routing(
        expert_ids_TK=torch.cat([part.expert_ids_TK for part in parts]),
        weights_TK=torch.cat([part.weights_TK for part in parts]),
        scores_TE=torch.cat([part.scores_TE for part in parts]),
        biased_TE=torch.cat([part.biased_TE for part in parts]),
        groups_TG=torch.cat(groups) if groups else None,
    )
