"""Decoding without an engine: the whole text again for every token, eagerly, one text at a time, with no cache."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from soli.engine.constraint import Constraint
from soli.engine.sampler import GREEDY, SamplerState, SamplingParams, TokenLogprob, sample
from soli.errors import SoliError
from soli.model.router import Routing
from soli.model.transformer import Transformer


@dataclass(frozen=True)
class Continuation:
    """What should come out of the engine; `routing` is that of one forward pass over `tokens_read`."""

    ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...]
    tokens_read: tuple[int, ...]
    routing: tuple[Routing, ...]


@torch.inference_mode()
def continuation(
    model: Transformer,
    prompt: Collection[int],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_ids: Collection[int] = (),
    constraint: Constraint | None = None,
) -> Continuation:
    """The tokens after a prompt by `Transformer.forward`. Each draws the random number of its seed and position."""
    ids, logprobs, finish_reason = list(prompt), [], "length"
    state = SamplerState(sampling, ids, model.config.vocab_size, constraint)
    for _ in range(max_new_tokens):
        logits_BV = model(torch.tensor([ids]))[:, -1]
        [drawn] = sample(logits_BV, [state], [2])
        assert not isinstance(drawn, SoliError), drawn
        if drawn.token in stop_ids:
            finish_reason = "stop"
            break
        ids.append(drawn.token)
        logprobs.append(drawn.logprob)
        state.accept(drawn.token)
        if state.finished:
            finish_reason = "stop"
            break
    # The last token is read only where the one after it, a stop token, was drawn.
    ends_with_stop_token = finish_reason == "stop" and not state.finished
    tokens_read = ids if ends_with_stop_token else ids[:-1]
    routing = model.backbone(torch.tensor([tokens_read])).routing
    return Continuation(tuple(ids[len(prompt) :]), finish_reason, tuple(logprobs), tuple(tokens_read), tuple(routing))
