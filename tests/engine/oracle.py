"""Decoding without an engine: the whole text again for every token, eagerly, one text at a time, with no cache.

`beam_search` has the rules of transformers' generate(num_beams=..., do_sample=False), with which it is compared.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from soli.engine.beam_search import BeamSearchParams
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


@torch.inference_mode()
def beam_search(
    model: Transformer,
    prompt: Collection[int],
    max_new_tokens: int,
    params: BeamSearchParams,
    stop_ids: Collection[int] = (),
) -> list[tuple[float, tuple[int, ...]]]:
    """Scores and new tokens of the finished texts, the best first. Of equal sums the lower beam, then the lower token
    comes first."""
    width, penalty = params.beam_width, params.length_penalty
    beams: list[tuple[int, ...]] = [()]
    sums_W = torch.zeros(1)
    finished: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, max_new_tokens + 1):
        logits_WV = model(torch.tensor([[*prompt, *beam] for beam in beams]))[:, -1]
        totals_C = (logits_WV.log_softmax(-1) + sums_W[:, None]).flatten()
        order = totals_C.sort(descending=True, stable=True).indices.tolist()
        ranked = [(float(totals_C[at]), *divmod(at, logits_WV.shape[1])) for at in order]
        for total, beam, token in ranked[:width]:
            if token in stop_ids or length == max_new_tokens:
                text = beams[beam] if token in stop_ids else (*beams[beam], token)
                finished.append((total / length**penalty, text))
        finished = sorted(finished, key=lambda one: -one[0])[:width]
        ranked = [one for one in ranked[: width * (1 + max(1, len(stop_ids)))] if one[2] not in stop_ids][:width]
        longest = max_new_tokens if params.early_stopping == "never" and penalty > 0 else length
        full = len(finished) == width
        if full and (params.early_stopping is True or ranked[0][0] / longest**penalty <= finished[-1][0]):
            break
        beams = [(*beams[beam], token) for _, beam, token in ranked]
        sums_W = torch.tensor([total for total, _, _ in ranked])
    return finished
