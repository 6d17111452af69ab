"""The engine: requests join and leave at every step; a step is one forward pass over what the scheduler chose.

One thread owns it. Tokens of all requests are one flat sequence, so weights are read once for all of them; attention
alone distinguishes the KV blocks of each. With speculation a step also computes a draft of each request's next token,
and gains a token where it is accepted (speculation.py). A request's answer does not depend on what else runs.
An error in a step ends the requests of that step and no others. Requests that could never run are rejected at once.

Shapes: T tokens of a step, N of them with logits, L MoE layers, E experts.
"""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count

import torch
from torch import Tensor

from soli.engine.beam_group import BeamGroup
from soli.engine.beam_search import likeliest_continuations
from soli.engine.constraint import Constraints, ConstraintUnmet
from soli.engine.detokenizer import TextStream, token_text
from soli.engine.latent_cache import BlockManager, LatentCache, blocks_for, bytes_per_token
from soli.engine.prompt_logprobs import prompt_logprobs
from soli.engine.request import (
    EngineLimits,
    EngineStats,
    Event,
    FinishReason,
    QueueFull,
    Request,
    check_request,
    mixture_layers,
)
from soli.engine.runner import ForwardOutput, ModelRunner, RunnerName
from soli.engine.sampler import SampledToken, SamplerState, sample
from soli.engine.scheduler import ScheduledTokens, Scheduler, SequenceState
from soli.engine.scratch import limit_scratch
from soli.engine.speculation import Drafter, DraftingGain, VerifiedTokens, verify
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.machine import available_memory
from soli.model.router import Routing, count_choices, slice_routing

log = logging.getLogger(__name__)

LIST_BYTES_PER_BLOCK = 40  # an integer and its place in the list of free blocks


class Engine:
    """`limits.cache_bytes` bounds the latent cache; KV blocks take memory when they are first used. `runner`: what
    computes a step (runner.py)."""

    def __init__(
        self, text_model: TextModel, limits: EngineLimits | None = None, *, runner: RunnerName = "auto"
    ) -> None:
        self.text_model = text_model
        model = self._model = text_model.model
        self.limits = limits = _within_budget(text_model, limits or EngineLimits())
        self._budget = text_model.budget
        if limits.speculate and not len(model.mtp):
            raise SoliError("this model has no MTP module to draft with: turn speculation off")
        self._device = model.embed_tokens.weight.device
        block_count = self._block_count()
        _check_bookkeeping(block_count, limits, text_model.positions)
        self._blocks = BlockManager(block_count)
        positions = min(text_model.positions, block_count * limits.block_size)  # a configuration may say 10^18
        self._cache = LatentCache(block_count, limits.block_size, limits.max_running, positions)
        self._scheduler = Scheduler(self._cache, self._blocks, limits)
        self._runner = ModelRunner(
            model, runner, drafts=limits.speculate, ranks=1 if text_model.leader is None else text_model.leader.world
        )
        self._drafter = self._new_drafter() if limits.speculate else None
        self._sequences: dict[int, SequenceState] = {}  # by request id
        self._beam_groups: dict[int, BeamGroup] = {}  # of those that search
        self._pending_events: list[Event] = []  # of requests that were cancelled, for the next step
        mixtures = len(mixture_layers(text_model))
        self._load_LE = torch.zeros(mixtures, model.config.n_routed_experts or 0, dtype=torch.int64)
        self._request_ids = count()
        self._step_seconds = 0.0
        self._steps = self._prompt_tokens = self._completion_tokens = self._drafted = self._accepted = 0

    def add(self, request: Request) -> int:
        """Queue a request; its id. QueueFull when too many wait; RejectedRequest for what could never run."""
        check_request(request, self.text_model, self.limits, self._blocks.block_count)
        if len(self._scheduler.waiting) - self._scheduler.free_slots >= self.limits.max_waiting:
            raise QueueFull(f"{self.limits.max_waiting} requests wait already: try again later")
        constraint = None if request.constraint is None else self._constraints.open(request.constraint)
        vocab_size = self._model.config.vocab_size
        sampler = SamplerState(
            request.sampling, request.prompt_ids, vocab_size, constraint, request.min_new_tokens, request.stop_ids
        )
        stream = TextStream(token_text(self.text_model.tokenizer, request.visible_ids), request.stop)
        sequence = SequenceState(next(self._request_ids), request, [*request.prompt_ids], sampler, stream)
        if request.beam_search is None:
            sequence.speculates = self._drafter is not None and self._drafter.begins(request)
        else:
            sequence.unopened_beams = request.sequences - 1
            self._beam_groups[sequence.request_id] = BeamGroup(sequence, self.text_model.tokenizer)
        self._sequences[sequence.request_id] = sequence
        self._scheduler.waiting.append(sequence)
        return sequence.request_id

    def prepare(self, request: Request) -> None:
        """What `add` would spend time on, for any thread to do before: compiles the request's constraint. Errors as
        those of `add`."""
        if request.constraint is not None:
            self._constraints.open(request.constraint)

    def prepare_constraints(self) -> None:
        """Reads the vocabulary for constraints, which the first constrained request would wait for; SoliError for a
        model whose answers cannot be constrained."""
        _ = self._constraints

    def cancel(self, request_id: int) -> None:
        """End a request now; the next step returns its last event. No effect on one that has ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._pending_events.append(self._end(sequence, "cancelled"))

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to return."""
        return bool(self._sequences or self._pending_events)

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
        start = time.perf_counter()
        try:
            return events + self._compute(parts)
        except Exception as error:
            return events + self._end_all(parts, error)
        finally:
            self._step_seconds += time.perf_counter() - start

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
            paging=None if self._budget is None else self._budget.paging(self._steps, self._step_seconds),
        )

    def _new_drafter(self) -> Drafter:
        """Decides by itself where experts are read from disk."""
        pages = self._budget is not None and not self._budget.store.holds_all
        return Drafter(self._model, self._cache, DraftingGain() if pages else None)

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
            waiting = {sequence.request_id: sequence for sequence in self._scheduler.waiting}  # several may be beams
            return [self._end(sequence, "error", error=str(error)) for sequence in waiting.values()]
        return []

    @cached_property
    def _constraints(self) -> Constraints:
        """Made for the first request that has a constraint: takes time and memory for a large vocabulary."""
        return self.text_model.constraints()

    def _compute(self, parts: Sequence[ScheduledTokens]) -> list[Event]:
        """Run the model, sample for sequences whose last token is in the step, draft what may follow."""
        start = time.perf_counter()
        output = self._forward(parts)
        drafts = sum(bool(part.sequence.drafts) for part in parts)
        decodes = all(part.samples and part.count == 1 + len(part.sequence.drafts) for part in parts)
        verified = self._sample(parts, output.logits_NV)
        events: list[Event] = []
        committed_parts: list[ScheduledTokens] = []
        drafting: set[SequenceState] = set()
        for part in parts:
            sequence = part.sequence
            tokens = verified.get(sequence)
            rejected = 0 if tokens is None else len(sequence.drafts) - tokens.accepted_drafts
            committed = ScheduledTokens(sequence, part.start, part.count - rejected, part.row)
            sequence.computed += committed.count
            try:
                logprobs = prompt_logprobs(self._model, part, output.hidden_TD)
            except SoliError as error:
                events.append(self._end_failed(sequence, error))
                continue
            routing = self._new_routing(committed, output.routing)
            if sequence.request.beam_search is not None:
                sequence.routing += [] if routing is None else [routing]
                self._scheduler.register_full_blocks(sequence)
                continue
            progress = Event(sequence.request_id, routing=routing, prompt_logprobs=logprobs)
            if self._drafter is None:
                self._scheduler.register_full_blocks(sequence)
            events += self._accept_all(sequence, tokens, progress)
            if part.is_last and not sequence.request.max_new_tokens:
                events.append(self._end(sequence, "length"))
            if sequence.request_id in self._sequences:
                committed_parts.append(committed)
                if tokens is not None and sequence.remaining_new_tokens > 1:
                    drafting.add(sequence)
        if self._drafter is not None:
            seconds = time.perf_counter() - start
            self._drafter.draft(self._runner.active, committed_parts, drafting, output.hidden_TD)
            if decodes:
                self._drafter.observe(parts, drafts, sum(len(one.tokens) for one in verified.values()), seconds)
            for part in committed_parts:
                self._scheduler.register_full_blocks(part.sequence)
        return events + self._advance_beams()

    def _advance_beams(self) -> list[Event]:
        """Continue or end every search whose beams are all computed."""
        events: list[Event] = []
        copies: list[tuple[int, int]] = []
        for group in [group for group in self._beam_groups.values() if group.is_complete]:
            try:
                selected = group.advance()
            except SoliError as error:
                events.append(self._end_failed(group.beams[0], error))
                continue
            if selected:
                group.beams, blocks = self._scheduler.continue_beams(group.beams, selected)
                copies += blocks
            else:
                events.append(self._end_search(group))
        self._cache.copy_blocks(copies)
        return events

    def _end_search(self, group: BeamGroup) -> Event:
        """The end of a search that has found its texts."""
        best = group.hypotheses[0]
        self._completion_tokens += len(best.ids)
        event = self._end(group.beams[0], best.finish_reason, best.text)
        assert event.usage is not None
        usage = replace(event.usage, completion=len(best.ids))
        return replace(event, routing=best.routing, usage=usage, hypotheses=tuple(group.hypotheses))

    def _forward(self, parts: Sequence[ScheduledTokens]) -> ForwardOutput:
        starts, counts = [part.start for part in parts], [part.count for part in parts]
        step = self._cache.step([part.sequence.row for part in parts], starts, counts, self._device)
        ids_T = torch.tensor([token for part in parts for token in part.tokens]).to(self._device)
        output = self._runner.active.forward(
            ids_T, step.positions_T, step, _logit_indices(parts), self._masked_experts(parts)
        )
        self._prompt_tokens += sum(
            max(0, min(len(part.sequence.request.prompt_ids) - part.start, part.count)) for part in parts
        )
        if len(output.routing) == len(self._load_LE) > 0:  # a layer may have been replaced since
            self._load_LE += count_choices(output.routing).cpu()
        return output

    def _sample(self, parts: Sequence[ScheduledTokens], logits_NV: Tensor) -> dict[SequenceState, VerifiedTokens]:
        """The next tokens of sequences whose last token is in the step; drafts are verified."""
        last = [part.sequence for part in parts if part.samples]
        if self._beam_groups:
            logits_NV, last = self._without_beams(logits_NV, last)
        if not any(sequence.drafts for sequence in last):
            tokens = sample(logits_NV, [one.sampler for one in last], [one.request.logprobs for one in last])
            return {one: VerifiedTokens((token,), 0) for one, token in zip(last, tokens, strict=True)}
        rows = logits_NV.cpu().split([len(one.drafts) + 1 for one in last])
        return {
            one: verify(rows_KV, one.drafts, one.sampler, one.request.stop_ids, one.request.logprobs)
            for one, rows_KV in zip(last, rows, strict=True)
        }

    def _without_beams(self, logits_NV: Tensor, last: list[SequenceState]) -> tuple[Tensor, list[SequenceState]]:
        """The logits and sequences that are sampled from; those of beams go to their groups."""
        owners = [sequence for sequence in last for _ in range(1 + len(sequence.drafts))]
        rows = [row for row, one in enumerate(owners) if one.request.beam_search is not None]
        if not rows:
            return logits_NV, last
        groups = [self._beam_groups[owners[row].request_id] for row in rows]
        continuations = likeliest_continuations(
            logits_NV[rows],
            [owners[row].log_probability for row in rows],
            max(group.considered for group in groups),
        )
        for row, group, listed in zip(rows, groups, continuations, strict=True):
            group.receive(owners[row], listed)
        others = [row for row, one in enumerate(owners) if one.request.beam_search is None]
        return logits_NV[others], [sequence for sequence in last if sequence.request.beam_search is None]

    def _accept_all(
        self, sequence: SequenceState, tokens: VerifiedTokens | None, progress: Event
    ) -> list[Event]:
        """The events of one request in a step; the last of them has what `progress` says about tokens read."""
        events: list[Event] = []
        if tokens is not None:
            sequence.drafted += len(sequence.drafts)
            sequence.accepted += tokens.accepted_drafts
            self._drafted += len(sequence.drafts)
            self._accepted += tokens.accepted_drafts
            sequence.drafts = []
            for token in tokens.tokens:
                events.append(self._accept(sequence, token))
                if events[-1].finish_reason is not None:
                    break
        if progress.routing is not None or progress.prompt_logprobs:
            last = events.pop() if events else progress
            events.append(replace(last, routing=progress.routing, prompt_logprobs=progress.prompt_logprobs))
        return events

    def _accept(self, sequence: SequenceState, sampled: SampledToken | SoliError) -> Event:
        """Continue or end an answer with a sampled token."""
        if isinstance(sampled, SoliError):
            return self._end_failed(sequence, sampled)
        if sampled.token in sequence.request.stop_ids:
            return replace(self._end(sequence, "stop", sequence.stream.finish()), stop_logprob=sampled.logprob)
        try:
            sequence.sampler.accept(sampled.token)
        except SoliError as error:  # a dead end of the constraint
            return self._end_failed(sequence, error)
        sequence.ids.append(sampled.token)
        self._completion_tokens += 1
        text = sequence.stream.push(sampled.token)
        if sequence.stream.stopped or sequence.sampler.finished:
            return self._end(sequence, "stop", text + sequence.stream.finish(), sampled)
        if sequence.remaining_new_tokens == 0:
            return self._end(sequence, "length", text + sequence.stream.finish(), sampled)
        return Event(sequence.request_id, sampled.token, text, sampled.logprob)

    def _end_failed(self, sequence: SequenceState, error: SoliError) -> Event:
        """The end of a request that has no next token."""
        field = "constraint" if isinstance(error, ConstraintUnmet) else None
        return replace(self._end(sequence, "error", error=str(error)), error_field=field)

    def _end(
        self,
        sequence: SequenceState,
        reason: FinishReason,
        text: str = "",
        sampled: SampledToken | None = None,
        error: str | None = None,
    ) -> Event:
        group = self._beam_groups.pop(sequence.request_id, None)
        for one in [sequence] if group is None else group.beams:
            self._scheduler.remove(one)
        del self._sequences[sequence.request_id]
        token, logprob = (sampled.token, sampled.logprob) if sampled else (None, None)
        return Event(
            sequence.request_id,
            token,
            text,
            logprob,
            stop_string=sequence.stream.stop_string,
            finish_reason=reason,
            usage=sequence.usage,
            error=error,
        )

    def _end_all(self, parts: Sequence[ScheduledTokens], error: Exception) -> list[Event]:
        """End the requests of a step that failed."""
        expected = isinstance(error, SoliError)
        log.error("a step failed: %s", error, exc_info=None if expected else error)
        message = str(error) if expected else _failure(error)
        self._blocks.clear_prefix_cache()  # a block may be half written
        return [
            self._end(part.sequence, "error", error=message)
            for part in parts
            if part.sequence.request_id in self._sequences
        ]

    def _new_routing(self, part: ScheduledTokens, layers: Sequence[Routing]) -> tuple[Routing, ...] | None:
        """The routing of the part's tokens, without those that an event had before a preemption."""
        sequence, end = part.sequence, part.start + part.count
        first = max(sequence.traced, part.start)
        if not sequence.request.trace or end <= first:
            return None
        sequence.traced = end
        row = part.row - part.start  # of position 0
        return tuple(slice_routing(layer, row + first, row + end) for layer in layers)

    def _masked_experts(self, parts: Sequence[ScheduledTokens]) -> dict[int, Tensor] | None:
        """For each layer with masks, bool (T, E): the experts that must not be selected for a token."""
        if not any(part.sequence.request.masked_experts for part in parts):
            return None
        T = sum(part.count for part in parts)
        masks: dict[int, Tensor] = {}
        for part in parts:
            for layer, expert in part.sequence.request.masked_experts:
                if layer not in masks:
                    masks[layer] = torch.zeros(T, self._load_LE.shape[1], dtype=torch.bool)
                masks[layer][part.row : part.row + part.count, expert] = True
        return {layer: mask_TE.to(self._device) for layer, mask_TE in masks.items()}


def _within_budget(text_model: TextModel, limits: EngineLimits) -> EngineLimits:
    """The same limits, with a latent cache for which the model's memory has room, and steps of so few tokens that their
    scratch takes a quarter of what is not weights; the model's experts get the rest."""
    budget, model = text_model.budget, text_model.model
    free_bytes = text_model.free_bytes if budget is None else budget.total - budget.resident
    if free_bytes is None:
        return limits
    dtype = model.compute_dtype or model.embed_tokens.weight.dtype
    limits, scratch = limit_scratch(model.config, limits, dtype, free_bytes)
    if budget is None:
        block_bytes = limits.block_size * bytes_per_token(model.config, len(model.layers) + limits.speculate, dtype)
        if free_bytes < scratch + block_bytes:
            raise SoliError(
                f"a rank's weights leave {max(0, free_bytes):,} bytes of its memory, but a step takes {scratch:,} and "
                f"a block of the latent cache {block_bytes:,}: allow {scratch + block_bytes - free_bytes:,} bytes more"
            )
        return replace(limits, cache_bytes=min(limits.cache_bytes, free_bytes - scratch))
    return replace(limits, cache_bytes=max(1, budget.divide(limits.cache_bytes, scratch)))


def _check_bookkeeping(block_count: int, limits: EngineLimits, positions: int) -> None:
    """SoliError when the list of blocks and the table of each running request's blocks do not fit in memory."""
    list_bytes = block_count * LIST_BYTES_PER_BLOCK
    table_bytes = limits.max_running * blocks_for(positions, limits.block_size) * 4
    available = available_memory()
    for name, size, field in (("list", list_bytes, "cache_bytes"), ("table", table_bytes, "max_running")):
        if size > available:
            raise SoliError(
                f"the engine's {field} is {getattr(limits, field)}, for which the {name} of blocks takes {size:,} "
                f"bytes, but {available:,} are available: give less"
            )


def _failure(error: Exception) -> str:
    """One sentence about a step that failed with an unexpected error."""
    size = re.search(r"(?:tried|[Uu]nable) to allocate ([0-9.]+ [A-Za-z]+)", str(error))
    if size is None:
        return f"the step failed with {type(error).__name__}; the log has more"
    number, unit = size[1].split()
    amount = f"{int(number):,} {unit}" if number.isdigit() else size[1]
    return f"the step needs {amount} of memory at once, which are not available: ask for fewer tokens at the same time"


def _logit_indices(parts: Sequence[ScheduledTokens]) -> list[int]:
    """The tokens of the step whose logits are sampled from: a sequence's last, with its drafts."""
    return [
        part.row + index
        for part in parts
        if part.samples
        for index in range(part.count - 1 - len(part.sequence.drafts), part.count)
    ]
