"""The engine: requests join and leave at every step; a step is one forward pass over what the scheduler chose.

One thread owns it. Tokens of all requests are one flat sequence, so weights are read once for all of them; attention
alone distinguishes the KV blocks of each. With speculation a step also computes a draft of each request's next token,
and gains a token where it is accepted (speculation.py). A request's answer does not depend on what else runs.
An error in a step ends the requests of that step and no others. Requests that could never run are rejected at once.

Shapes: T tokens of a step, N of them with logits, L MoE layers, E experts.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from soli.engine.constraint import Constraints
from soli.engine.detokenizer import TextStream, token_text
from soli.engine.latent_cache import BlockManager, LatentCache, bytes_per_token
from soli.engine.request import (
    EngineLimits,
    EngineStats,
    Event,
    FinishReason,
    QueueFull,
    Request,
    Usage,
    check_request,
    mixture_layers,
)
from soli.engine.runner import ForwardOutput, ModelRunner, RunnerName
from soli.engine.sampler import SampledToken, SamplerState, sample
from soli.engine.scheduler import ScheduledTokens, Scheduler, SequenceState
from soli.engine.speculation import CommittedTokens, Draft, Drafter, VerifiedTokens, verify
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.model.router import Routing, count_choices, slice_routing

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Generation(SequenceState):
    """A sequence with the state of its text."""

    sampler: SamplerState
    stream: TextStream
    draft_distributions: list[Draft] = field(default_factory=list)  # of `drafts`
    traced: int = 0  # tokens whose routing is in an event
    drafted: int = 0
    accepted: int = 0

    @property
    def usage(self) -> Usage:
        prompt = len(self.request.prompt_ids)
        return Usage(prompt, len(self.ids) - prompt, self.cached, self.drafted, self.accepted)

    @property
    def remaining_new_tokens(self) -> int:
        """Tokens that may still be sampled."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens - len(self.ids)


class Engine:
    """`limits.cache_bytes` bounds the latent cache; KV blocks take memory when they are first used. `runner`: what
    computes a step (runner.py)."""

    def __init__(
        self, text_model: TextModel, limits: EngineLimits | None = None, *, runner: RunnerName = "auto"
    ) -> None:
        self.text_model = text_model
        self.limits = limits = limits or EngineLimits()
        model = self._model = text_model.model
        if limits.speculate and not len(model.mtp):
            raise SoliError("this model has no MTP module to draft with: turn speculation off")
        self._device = model.embed_tokens.weight.device
        self._blocks = BlockManager(self._block_count())
        block_count, positions = self._blocks.block_count, text_model.positions
        self._cache = LatentCache(block_count, limits.block_size, limits.max_running, positions)
        self._scheduler = Scheduler(self._cache, self._blocks, limits, limits.speculate)
        self._runner = ModelRunner(model, runner, drafts=limits.speculate)
        self._drafter = Drafter(model, self._cache) if limits.speculate else None
        self._generations: dict[int, _Generation] = {}  # by request id
        self._pending_events: list[Event] = []  # of requests that were cancelled, for the next step
        self._constraints: Constraints | None = None
        mixtures = len(mixture_layers(text_model))
        self._load_LE = torch.zeros(mixtures, model.config.n_routed_experts or 0, dtype=torch.int64)
        self._next_id = self._steps = self._prompt_tokens = self._completion_tokens = 0
        self._drafted = self._accepted = 0

    def add(self, request: Request) -> int:
        """Queue a request; its id. QueueFull when too many wait; RejectedRequest for what could never run."""
        check_request(request, self.text_model, self.limits, self._blocks.block_count)
        if len(self._scheduler.waiting) - self._scheduler.free_slots >= self.limits.max_waiting:
            raise QueueFull(f"{self.limits.max_waiting} requests wait already: try again later")
        sampler = self._sampler_state(request)
        stream = TextStream(token_text(self.text_model.tokenizer), request.stop)
        generation = _Generation(self._next_id, request, list(request.prompt_ids), sampler=sampler, stream=stream)
        self._next_id += 1
        self._generations[generation.request_id] = generation
        self._scheduler.waiting.append(generation)
        return generation.request_id

    def cancel(self, request_id: int) -> None:
        """End a request now; the next step returns its last event. No effect on one that has ended already."""
        generation = self._generations.get(request_id)
        if generation is not None:
            self._pending_events.append(self._end(generation, "cancelled"))

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to return."""
        return bool(self._generations or self._pending_events)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward pass, and the events of the requests in it."""
        events, self._pending_events = self._pending_events, []
        if self._scheduler.waiting and self._scheduler.free_slots:
            events += self._check_model()
        parts = self._scheduler.schedule()
        if not parts:
            return events
        self._steps += 1
        try:
            return events + self._compute(parts)
        except Exception as error:
            return events + self._end_all(parts, error)

    def stats(self) -> EngineStats:
        """The engine's metrics."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            blocks_used=self._blocks.used,
            blocks_total=self._blocks.block_count,
            cache_bytes=self._cache.nbytes(),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            prefix_hit_tokens=self._scheduler.prefix_hit_tokens,
            preemptions=self._scheduler.preemptions,
            drafted=self._drafted,
            accepted=self._accepted,
            expert_load=tuple(map(tuple, self._load_LE.tolist())),
        )

    def _block_count(self) -> int:
        model, limits = self._model, self.limits
        dtype = model.compute_dtype or model.embed_tokens.weight.dtype
        layers = model.config.num_hidden_layers + limits.speculate
        block_bytes = limits.block_size * bytes_per_token(model.config, layers, dtype)
        block_count = limits.cache_bytes // block_bytes
        if block_count < 1:
            raise SoliError(
                f"a cache of {limits.cache_bytes} bytes holds no block of {limits.block_size} tokens, which takes "
                f"{block_bytes}: give cache_bytes of {block_bytes} or more"
            )
        return block_count

    def _check_model(self) -> list[Event]:
        """Follow a change of the model; where no runner is left for it, what waits ends with the reason."""
        try:
            if self._runner.update():
                self._scheduler.forget_latents()
        except SoliError as error:
            waiting = [self._generations[sequence.request_id] for sequence in self._scheduler.waiting]
            return [self._end(generation, "error", error=str(error)) for generation in waiting]
        return []

    def _sampler_state(self, request: Request) -> SamplerState:
        vocab_size = self._model.config.vocab_size
        constraint = None
        if request.constraint is not None:
            if self._constraints is None:  # takes time and memory for a large vocabulary
                self._constraints = Constraints(self.text_model.tokenizer, vocab_size, self.text_model.stop_ids)
            constraint = self._constraints.open(request.constraint)
        return SamplerState(request.sampling, request.prompt_ids, vocab_size, constraint)

    def _compute(self, parts: Sequence[ScheduledTokens]) -> list[Event]:
        """Run the model, sample for sequences whose last token is in the step, draft what may follow."""
        output, ends = self._forward(parts)
        self._count(parts, output.routing)
        verified = self._sample(parts, output.logits_NV)
        events: list[Event] = []
        committed: list[CommittedTokens] = []
        for part, end in zip(parts, ends, strict=True):
            generation, row = self._generations[part.sequence.request_id], end - part.count
            tokens = verified.get(generation.request_id)
            count = part.count if tokens is None else part.count - len(generation.drafts) + tokens.accepted_drafts
            routing = self._new_routing(generation, part, count, output.routing, row)
            self._scheduler.advance(generation, count)
            if self._drafter is None:
                self._scheduler.register_full_blocks(generation)
            events += self._accept_all(generation, tokens, routing)
            if generation.request_id in self._generations:
                drafts = tokens is not None and generation.remaining_new_tokens > 1
                state = generation.sampler if drafts else None
                committed.append(CommittedTokens(generation, part.start, count, row, state))
        if self._drafter is not None:
            self._draft(self._drafter, committed, output.hidden_TD)
        return events

    def _forward(self, parts: Sequence[ScheduledTokens]) -> tuple[ForwardOutput, list[int]]:
        """The forward pass, and where the tokens of each part end in it."""
        starts, counts = [part.start for part in parts], [part.count for part in parts]
        step = self._cache.step([part.sequence.row for part in parts], starts, counts, self._device)
        ids_T = torch.tensor([token for part in parts for token in part.tokens]).to(self._device)
        ends = list(accumulate(counts))
        logit_indices, masked_experts = _logit_indices(parts, ends), self._masked_experts(parts)
        return self._runner.active.forward(ids_T, step.positions_T, step, logit_indices, masked_experts), ends

    def _sample(self, parts: Sequence[ScheduledTokens], logits_NV: Tensor) -> dict[int, VerifiedTokens]:
        """The next tokens of sequences whose last token is in the step, by request id; drafts are verified."""
        last = [self._generations[part.sequence.request_id] for part in parts if part.is_last]
        ends = list(accumulate(1 + len(generation.drafts) for generation in last))
        tokens: dict[int, VerifiedTokens] = {}
        undrafted = [(one, end - 1) for one, end in zip(last, ends, strict=True) if not one.drafts]
        if undrafted:
            own_NV = logits_NV if len(undrafted) == len(last) else logits_NV[[row for _, row in undrafted]]
            states = [one.sampler for one, _ in undrafted]
            samples = sample(own_NV, states, [one.request.logprobs for one, _ in undrafted])
            for (one, _), token in zip(undrafted, samples, strict=True):
                tokens[one.request_id] = VerifiedTokens((token,), 0)
        for one, end in zip(last, ends, strict=True):
            if one.drafts:
                own_KV, request = logits_NV[end - 1 - len(one.drafts) : end], one.request
                drafts = one.draft_distributions
                tokens[one.request_id] = verify(own_KV, drafts, one.sampler, request.stop_ids, request.logprobs)
        return tokens

    def _draft(self, drafter: Drafter, committed: Sequence[CommittedTokens], hidden_TD: Tensor) -> None:
        drafts = drafter.draft(self._runner.active, committed, hidden_TD)
        for part in committed:
            self._scheduler.register_full_blocks(part.sequence)
            draft = drafts.get(part.sequence.request_id)
            if draft is not None:
                self._generations[part.sequence.request_id].draft_distributions = [draft]
                part.sequence.drafts = [draft.token]

    def _accept_all(
        self, generation: _Generation, tokens: VerifiedTokens | None, routing: tuple[Routing, ...] | None
    ) -> list[Event]:
        """The events of one request in a step; the last of them has the routing."""
        events: list[Event] = []
        if tokens is not None:
            generation.drafted += len(generation.drafts)
            generation.accepted += tokens.accepted_drafts
            self._drafted += len(generation.drafts)
            self._accepted += tokens.accepted_drafts
            generation.drafts, generation.draft_distributions = [], []
            for token in tokens.tokens:
                events.append(self._accept(generation, token))
                if events[-1].finish_reason is not None:
                    break
        if routing is None:
            return events
        if not events:
            return [Event(generation.request_id, routing=routing)]
        return [*events[:-1], replace(events[-1], routing=routing)]

    def _accept(self, generation: _Generation, sampled: SampledToken | SoliError) -> Event:
        """Continue or end an answer with a sampled token."""
        if isinstance(sampled, SoliError):
            return self._end(generation, "error", error=str(sampled))
        token = sampled.token
        if token in generation.request.stop_ids:
            return self._end(generation, "stop", generation.stream.finish())
        try:
            generation.sampler.accept(token)
        except SoliError as error:  # a dead end of the constraint
            return self._end(generation, "error", error=str(error))
        generation.ids.append(token)
        self._completion_tokens += 1
        text = generation.stream.push(token)
        reason = _finish_reason(generation)
        if reason is None:
            return Event(generation.request_id, token, text, sampled.logprob)
        if not generation.stream.stopped:
            text += generation.stream.finish()
        return self._end(generation, reason, text, token, sampled)

    def _end(
        self,
        generation: _Generation,
        reason: FinishReason,
        text: str = "",
        token: int | None = None,
        sampled: SampledToken | None = None,
        error: str | None = None,
    ) -> Event:
        self._scheduler.remove(generation)
        del self._generations[generation.request_id]
        logprob = sampled.logprob if sampled else None
        return Event(generation.request_id, token, text, logprob, None, reason, generation.usage, error)

    def _end_all(self, parts: Sequence[ScheduledTokens], error: Exception) -> list[Event]:
        """End the requests of a step that failed."""
        expected = isinstance(error, SoliError)
        log.error("a step failed: %s", error, exc_info=None if expected else error)
        message = str(error) if expected else f"the step failed with {type(error).__name__}; the log has more"
        self._blocks.clear_prefix_cache()  # a block may be half written
        ids = [part.sequence.request_id for part in parts if part.sequence.request_id in self._generations]
        return [self._end(self._generations[request_id], "error", error=message) for request_id in ids]

    def _count(self, parts: Sequence[ScheduledTokens], layers: Sequence[Routing]) -> None:
        for part in parts:
            prompt = len(part.sequence.request.prompt_ids)
            self._prompt_tokens += max(0, min(prompt - part.start, part.count))
        if len(layers) == len(self._load_LE) > 0:  # a layer may have been replaced since
            self._load_LE += count_choices(layers).cpu()

    def _new_routing(
        self, generation: _Generation, part: ScheduledTokens, count: int, layers: Sequence[Routing], row: int
    ) -> tuple[Routing, ...] | None:
        """The routing of the part's first `count` tokens, from `row` of the step on, without those that an event had
        before a preemption."""
        end = part.start + count
        first = max(generation.traced, part.start)
        if not generation.request.trace or end <= first:
            return None
        generation.traced = end
        return tuple(slice_routing(layer, row + first - part.start, row + count) for layer in layers)

    def _masked_experts(self, parts: Sequence[ScheduledTokens]) -> dict[int, Tensor] | None:
        """For each layer with masks, bool (T, E): the experts that must not be selected for a token."""
        if not any(part.sequence.request.masked_experts for part in parts):
            return None
        T, start = sum(part.count for part in parts), 0
        masks: dict[int, Tensor] = {}
        for part in parts:
            for layer, expert in part.sequence.request.masked_experts:
                if layer not in masks:
                    masks[layer] = torch.zeros(T, self._load_LE.shape[1], dtype=torch.bool)
                masks[layer][start : start + part.count, expert] = True
            start += part.count
        return {layer: mask_TE.to(self._device) for layer, mask_TE in masks.items()}


def _logit_indices(parts: Sequence[ScheduledTokens], ends: Sequence[int]) -> list[int]:
    """The tokens of the step whose logits are sampled from: a sequence's last, with its drafts."""
    return [
        index
        for part, end in zip(parts, ends, strict=True)
        if part.is_last
        for index in range(end - 1 - len(part.sequence.drafts), end)
    ]


def _finish_reason(generation: _Generation) -> FinishReason | None:
    if generation.stream.stopped or generation.sampler.finished:
        return "stop"
    return "length" if generation.remaining_new_tokens == 0 else None
