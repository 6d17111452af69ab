"""What goes into the engine and what comes out: requests, events, answers, limits, metrics.

A request is one answer to one prompt; n answers are n requests whose seeds `SamplingParams.for_choice` derives.
Requests that could never run are rejected before they wait: empty or too long prompts, more tokens than the cache
holds, masked experts that leave a router too few.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from soli.analysis.notebook_views import heat_map, html_text
from soli.engine.beam_search import BeamSearchParams, Hypothesis, options_beams_lack
from soli.engine.constraint import ConstraintSpec
from soli.engine.latent_cache import blocks_for
from soli.engine.sampler import GREEDY, SamplingParams, TokenLogprob
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.experts.paging_stats import PagingStats
from soli.model.moe import MoE
from soli.model.router import Routing, count_choices, join_routing
from soli.model.transformer import find_mixture
from soli.sections import shown

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `max_new_tokens` 0, with `prompt_logprobs` alone: nothing is sampled.

    `stop`: strings that end the text and are no part of it, also across token borders. `logprobs`: None for none, k for
    the sampled token's and the k likeliest; `prompt_logprobs`: likewise, of every token of the prompt but the first.
    `trace`: the routing of every token that is computed, of the prompt too.
    `masked_experts`: (layer, expert) pairs that must not be selected; layers are numbered as in the files.
    `constraint`: what the whole text must be; it ends where nothing else can follow. `min_new_tokens`: none of the
    `stop_ids` comes before so many tokens. `visible_ids`: special tokens that are part of the text, which others are
    not. `beam_search`: search with so many beams instead of sampling; nothing is known of the text before its end.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    trace: bool = False
    masked_experts: frozenset[tuple[int, int]] = frozenset()
    constraint: ConstraintSpec | None = None
    min_new_tokens: int = 0
    visible_ids: frozenset[int] = frozenset()
    beam_search: BeamSearchParams | None = None

    @property
    def sequences(self) -> int:
        """How many sequences run for it."""
        return 1 if self.beam_search is None else self.beam_search.beam_width


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. `cached`: of the prompt, in the prefix cache and not computed again."""

    prompt: int
    completion: int
    cached: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Event:
    """The progress of one request in one step.

    `token` None: only text that was held back, what was read of the prompt, or the end. `text`: whole characters that
    no stop string can include any more; often "". `prompt_logprobs`: of the next tokens of the prompt, from the second.
    `stop_logprob`: of the stop token that ended the text, and `stop_string`: the one that did; neither is part of it.
    `routing`: of the tokens of this step, one Routing per MoE layer of the main model; of a beam search of all tokens
    of its best text, in the last event, which has its `hypotheses`, the best first. The last event has `finish_reason`
    and `usage`; with "error" also `error`, one sentence, and `error_field`, the field of the request that is to blame
    if one is.
    """

    request_id: int
    token: int | None = None
    text: str = ""
    logprob: TokenLogprob | None = None
    routing: tuple[Routing, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    stop_logprob: TokenLogprob | None = None
    stop_string: str | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None
    error_field: str | None = None
    hypotheses: tuple[Hypothesis, ...] = ()


@dataclass(frozen=True, repr=False)
class Answer:
    """A whole answer. `ids`: the new tokens, without the stop token. `logprobs`: one per new token, `prompt_logprobs`:
    one per token of the prompt but the first, and `routing`: one Routing per MoE layer over all tokens that the model
    read (the prompt, then `ids`, less the last one when no stop token followed it), each None unless the request asks
    for it. `hypotheses`: of a beam search its finished texts, the best first, which is this answer."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None
    routing: tuple[Routing, ...] | None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    hypotheses: tuple[Hypothesis, ...] = ()

    @property
    def summary(self) -> str:
        """Why it ended, and tokens of prompt and answer."""
        return f"{self.finish_reason} after {self.usage.prompt} + {self.usage.completion} tokens"

    def __repr__(self) -> str:
        logprobs = "" if self.logprobs is None else ", with logprobs"
        routing = "" if self.routing is None else f", with routing of {len(self.routing)} layers"
        return f"<Answer {shown(self.text)}, {self.summary}{logprobs}{routing}>"

    def _repr_html_(self) -> str:
        return html_text(self.text) + html_text(self.summary) + self.routing_map()

    def routing_map(self) -> str:
        """The routing as HTML: per MoE layer, how often each expert was selected; empty without routing."""
        if not self.routing:
            return ""
        tokens, K = self.routing[0].expert_ids_TK.shape
        caption = f"experts selected, {K} for each of {tokens} tokens; a row per MoE layer"
        return heat_map(caption, count_choices(self.routing).tolist(), "MoE layer", "tokens")

    @classmethod
    def from_events(cls, request: Request, events: Iterable[Event]) -> "Answer":
        """All events of one request, the last included, as one value; SoliError for a request that failed."""
        events = [checked(event) for event in events]
        last, parts = events[-1], [event.routing for event in events if event.routing is not None]
        assert last.finish_reason is not None and last.usage is not None
        sampled_ids = tuple(event.token for event in events if event.token is not None)
        return cls(
            prompt_ids=request.prompt_ids,
            ids=last.hypotheses[0].ids if last.hypotheses else sampled_ids,
            text="".join(event.text for event in events),
            finish_reason=last.finish_reason,
            usage=last.usage,
            logprobs=None if request.logprobs is None else tuple(event.logprob for event in events if event.logprob),
            routing=tuple(map(join_routing, zip(*parts, strict=True))) if parts else None,
            prompt_logprobs=(
                None
                if request.prompt_logprobs is None
                else tuple(logprob for event in events for logprob in event.prompt_logprobs)
            ),
            hypotheses=last.hypotheses,
        )


def checked(event: Event) -> Event:
    """The event itself, or the SoliError that it carries."""
    if event.finish_reason == "error":
        raise SoliError(event.error or "the request failed")
    return event


@dataclass(frozen=True)
class EngineLimits:
    """The engine's memory and batch sizes. `cache_bytes`: at most, of the latent cache. `tokens_per_step`: at most, so
    that a long prompt delays the next token of the others by no more than that. `prefix_sharing`: keep the KV blocks of
    prompts for later ones that begin alike. `speculate`: draft with the model's MTP module; measured to be slower on
    CPUs (benchmarks/speculation.py)."""

    cache_bytes: int = 2**30
    max_running: int = 16
    max_waiting: int = 256
    tokens_per_step: int = 512
    block_size: int = 16
    prefix_sharing: bool = True
    speculate: bool = False

    def __post_init__(self) -> None:
        for name, least in (("cache_bytes", 1), ("max_running", 1), ("max_waiting", 0), ("block_size", 1)):
            if getattr(self, name) < least:
                raise SoliError(f"the engine's {name} is {getattr(self, name)}: give {least} or more")
        if self.tokens_per_step < self.max_running:
            raise SoliError(
                f"the engine's tokens_per_step is {self.tokens_per_step}, but each of {self.max_running} running "
                f"requests has a token in a step: give {self.max_running} or more"
            )


@dataclass(frozen=True)
class EngineStats:
    """The engine's metrics; counts of tokens and events are since its start."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    cache_bytes: int
    steps: int
    prompt_tokens: int
    completion_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    drafted: int
    accepted: int
    expert_load: tuple[tuple[int, ...], ...]  # per MoE layer, how often each expert was selected
    paging: PagingStats | None = None  # of a model whose experts are read from disk


class QueueFull(SoliError):
    """As many requests wait as may: try again later."""


class RejectedRequest(SoliError):
    """A request that can never run. `field`: the one to blame; `too_long`: for the model's positions."""

    def __init__(self, field: str, message: str, too_long: bool = False) -> None:
        super().__init__(message)
        self.field, self.too_long = field, too_long


def mixture_layers(text_model: TextModel) -> dict[int, MoE]:
    """The main model's mixture layers by their number."""
    blocks = enumerate(text_model.model.layers)
    return {layer: mixture for layer, block in blocks if (mixture := find_mixture(block)) is not None}


def check_request(request: Request, text_model: TextModel, limits: EngineLimits, block_count: int) -> None:
    """RejectedRequest, with the field of the request that is to blame. `block_count`: of the whole cache."""
    prompt, limit, vocab = request.prompt_ids, request.max_new_tokens, text_model.model.config.vocab_size
    if not prompt:
        raise RejectedRequest("prompt_ids", "the prompt is empty: give it at least one token")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise RejectedRequest(
            "prompt_ids", f"the prompt holds token {max(prompt)}, but the model's vocabulary ends at {vocab - 1}"
        )
    if limit < (request.prompt_logprobs is None):
        raise RejectedRequest("max_new_tokens", f"max_new_tokens is {limit}: ask for at least 1")
    if not 0 <= request.min_new_tokens <= limit:
        raise RejectedRequest(
            "min_new_tokens", f"min_new_tokens is {request.min_new_tokens}: give 0 to max_new_tokens, {limit}"
        )
    _check_beam_search(request, limits, vocab)
    together = f"the prompt has {len(prompt)} tokens and asks for {limit} more"
    if len(prompt) + limit > text_model.positions:
        raise RejectedRequest(
            "max_new_tokens",
            f"{together}, but the model has only {text_model.positions} positions: shorten the text or ask for fewer "
            "tokens",
            too_long=True,
        )
    if blocks_for(len(prompt) + limit, limits.block_size) * request.sequences > block_count:
        beams = "" if request.beam_search is None else f" in each of {request.sequences} beams"
        fewer = "" if request.beam_search is None else "take fewer beams, "
        raise RejectedRequest(
            "max_new_tokens",
            f"{together}{beams}, but the cache of {limits.cache_bytes} bytes holds {block_count} blocks of "
            f"{limits.block_size} tokens: shorten the text, {fewer}ask for fewer tokens or give the engine more "
            "cache_bytes",
        )
    _check_masked_experts(request.masked_experts, text_model)


def _check_beam_search(request: Request, limits: EngineLimits, vocab_size: int) -> None:
    params = request.beam_search
    if params is None:
        return
    for name in options_beams_lack(request):
        raise RejectedRequest("beam_search", f"a beam search takes no {name}: leave it out, or the beams")
    if params.beam_width > limits.max_running:
        raise RejectedRequest(
            "beam_search",
            f"beam_width is {params.beam_width}, but the engine runs at most {limits.max_running} sequences at the "
            "same time: give fewer beams, or the engine a larger max_running",
        )
    try:
        params.check_vocabulary(vocab_size, request.stop_ids)
    except SoliError as error:
        raise RejectedRequest("beam_search", str(error)) from None


def _check_masked_experts(masked_experts: frozenset[tuple[int, int]], text_model: TextModel) -> None:
    mixtures = mixture_layers(text_model) if masked_experts else {}
    for layer in sorted({layer for layer, _ in masked_experts}):
        experts = {expert for masked_layer, expert in masked_experts if masked_layer == layer}
        if layer not in mixtures:
            raise RejectedRequest(
                "masked_experts", f"layer {layer} has no routed experts to mask; those with are {sorted(mixtures)}"
            )
        gate = mixtures[layer].gate
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
