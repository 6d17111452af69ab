"""The engine: requests join and leave at every step, each step is one pass of the model over what the scheduler chose.

One thread owns it. Tokens of all requests stand in one flat row, so weights are read once for all of them; attention
alone looks at each request's own pages. With speculation a step also reads a draft of each request's next token, and
gains two tokens where it holds (drafter.py, speculate.py). A request's answer does not depend on what else runs. An
error in a step ends the requests of that step and nothing else. Refuses at once what could never run: empty or too
long prompts, more tokens than the cache holds, mutes that leave a router too few experts.

Shapes: T tokens of a step, L MoE layers, E experts.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from soli.engine.admission import check, mixture_layers
from soli.engine.blocks import BlockManager
from soli.engine.constraint import Constraints
from soli.engine.detokenizer import TextStream, token_text
from soli.engine.drafter import Drafter, Followed
from soli.engine.latent_cache import LatentCache, bytes_per_token
from soli.engine.request import EngineLimits, EngineStats, Event, FinishReason, QueueFull, Request, Usage
from soli.engine.runner import ModelRunner, RunnerName
from soli.engine.sampler import Drawn, SamplerState, sample
from soli.engine.scheduler import Read, Scheduler, Task
from soli.engine.speculate import Draft, Verified, verify
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.model.router import Routing, count_choices, slice_routing

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Answer(Task):
    """A task with what its text needs."""

    state: SamplerState
    stream: TextStream
    guesses: list[Draft] = field(default_factory=list)  # of the drafts
    shown: int = 0  # tokens whose routing was handed out
    drafted: int = 0
    accepted: int = 0

    @property
    def usage(self) -> Usage:
        prompt = len(self.request.prompt_ids)
        return Usage(prompt, len(self.ids) - prompt, self.cached, self.drafted, self.accepted)

    @property
    def room(self) -> int:
        """Tokens that may still be drawn."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens - len(self.ids)


class Engine:
    """`limits.cache_bytes` bounds the latent cache; pages take memory as they are first used."""

    def __init__(
        self, text_model: TextModel, limits: EngineLimits | None = None, *, runner: RunnerName = "auto"
    ) -> None:
        self.text_model, self.limits = text_model, limits or EngineLimits()
        model = self._model = text_model.model
        self._device = model.embed_tokens.weight.device
        dtype = model.compute_dtype or model.embed_tokens.weight.dtype
        layers = model.config.num_hidden_layers + self.limits.speculate
        page = self.limits.block_size * bytes_per_token(model.config, layers, dtype)
        pages = self.limits.cache_bytes // page
        if pages < 1:
            raise SoliError(
                f"a cache of {self.limits.cache_bytes} bytes holds no page of {self.limits.block_size} tokens, which "
                f"takes {page}: give cache_bytes of {page} or more"
            )
        self._pages = BlockManager(pages)
        self._cache = LatentCache(pages, self.limits.block_size, self.limits.max_running, text_model.positions)
        self._scheduler = Scheduler(self._cache, self._pages, self.limits, self.limits.speculate)
        if self.limits.speculate and not len(model.mtp):
            raise SoliError("this model has no MTP module to draft with: turn speculation off")
        self._runner = ModelRunner(model, runner, drafts=self.limits.speculate)
        self._drafter = Drafter(model, self._cache) if self.limits.speculate else None
        self._answers: dict[int, _Answer] = {}
        self._ended: list[Event] = []  # told with the next step
        self._constraints: Constraints | None = None
        mixtures = len(mixture_layers(text_model))
        self._load_LE = torch.zeros(mixtures, model.config.n_routed_experts or 0, dtype=torch.int64)
        self._next = self._steps = self._prompt_tokens = self._completion_tokens = 0
        self._drafted = self._accepted = 0

    def add(self, request: Request) -> int:
        """Takes a request; its number. QueueFull when too many wait; Refused or SoliError for what could never run."""
        check(request, self.text_model, self.limits, self._pages.pages)
        if len(self._scheduler.waiting) - self._scheduler.places >= self.limits.max_waiting:
            raise QueueFull(f"{self.limits.max_waiting} requests wait already: try again later")
        state = self._state(request)
        stream = TextStream(token_text(self.text_model.tokenizer), request.stop)
        answer = _Answer(self._next, request, list(request.prompt_ids), state=state, stream=stream)
        self._next += 1
        self._answers[answer.number] = answer
        self._scheduler.waiting.append(answer)
        return answer.number

    def cancel(self, number: int) -> None:
        """Ends a request now; the next step tells so. One that has ended already is left alone."""
        answer = self._answers.get(number)
        if answer is not None:
            self._ended.append(self._end(answer, "cancelled"))

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._answers or self._ended)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One pass, and what it brought."""
        events, self._ended = self._ended, []
        if self._scheduler.waiting and self._scheduler.places:
            events += self._follow_model()
        reads = self._scheduler.plan()
        if not reads:
            return events
        self._steps += 1
        try:
            return events + self._read(reads)
        except Exception as error:
            known = isinstance(error, SoliError)
            log.error("a step failed: %s", error, exc_info=not known)
            said = str(error) if known else f"the step failed with {type(error).__name__}; the log has more"
            self._pages.forget()  # a page may be half written
            failed = [answer for read in reads if (answer := self._answers.get(read.task.number)) is not None]
            return events + [self._end(answer, "error", error=said) for answer in failed]

    def stats(self) -> EngineStats:
        """How the engine stands now."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            blocks_used=self._pages.used,
            blocks_total=self._pages.pages,
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

    def _follow_model(self) -> list[Event]:
        """See whether the model has changed; where no runner is left for it, what waits ends with the reason."""
        try:
            if self._runner.update():
                self._scheduler.forget_latents()
        except SoliError as error:
            waiting = [self._answers[task.number] for task in self._scheduler.waiting]
            return [self._end(answer, "error", error=str(error)) for answer in waiting]
        return []

    def _state(self, request: Request) -> SamplerState:
        vocab, constraint = self._model.config.vocab_size, None
        if request.constraint is not None:
            if self._constraints is None:  # its package is an extra
                self._constraints = Constraints(self.text_model.tokenizer, vocab, self.text_model.stop_ids)
            constraint = self._constraints.open(request.constraint)
        return SamplerState(request.sampling, request.prompt_ids, vocab, constraint)

    def _read(self, reads: Sequence[Read]) -> list[Event]:
        """Runs the model over the reads, draws for those that are read to their end, drafts what may follow."""
        counts = [read.count for read in reads]
        now = self._cache.begin([read.task.row for read in reads], [read.start for read in reads], counts, self._device)
        ids_T = torch.tensor([token for read in reads for token in read.tokens]).to(self._device)
        ends = list(accumulate(counts))
        logit_indices, masks = self._wanted(reads, ends), self._muted(reads)
        made = self._runner.active.forward(ids_T, now.positions_T, now, logit_indices, masks)
        self._count(reads, made.routing)
        drawn = self._draw(reads, made.logits_NV)
        events: list[Event] = []
        followed: list[Followed] = []
        for read, end in zip(reads, ends, strict=True):
            answer = self._answers[read.task.number]
            found = drawn.get(answer.number)
            stays = read.count if found is None else read.count - len(answer.drafts) + found.kept
            routing = self._new_routing(answer, read, stays, made.routing, end - read.count)
            self._scheduler.advance(answer, stays)
            if self._drafter is None:
                self._scheduler.publish(answer)
            events += self._accept_all(answer, found, routing)
            if answer.number in self._answers:
                wants = answer.state if found is not None and answer.room > 1 else None
                followed.append(Followed(answer, read.start, stays, end - read.count, wants))
        if self._drafter is not None:
            self._draft(self._drafter, followed, made.hidden_TD)
        return events

    def _wanted(self, reads: Sequence[Read], ends: Sequence[int]) -> list[int]:
        """The rows whose logits are drawn from: the last of everyone who is read to the end, with its drafts."""
        last = [(self._answers[read.task.number], end) for read, end in zip(reads, ends, strict=True) if read.last]
        return [row for answer, end in last for row in range(end - 1 - len(answer.drafts), end)]

    def _draw(self, reads: Sequence[Read], logits_NV: Tensor) -> dict[int, Verified]:
        """The next tokens of everyone who is read to the end, by number; drafts are verified."""
        last = [self._answers[read.task.number] for read in reads if read.last]
        stops = list(accumulate(1 + len(answer.drafts) for answer in last))
        plain = [(answer, stop - 1) for answer, stop in zip(last, stops, strict=True) if not answer.drafts]
        found: dict[int, Verified] = {}
        if plain:
            states, asked = [one.state for one, _ in plain], [one.request.logprobs for one, _ in plain]
            own_NV = logits_NV if len(plain) == len(last) else logits_NV[[row for _, row in plain]]
            tokens = sample(own_NV, states, asked)
            found = {one.number: Verified((token,), 0) for (one, _), token in zip(plain, tokens, strict=True)}
        for one, stop in zip(last, stops, strict=True):
            if one.drafts:
                own_KV = logits_NV[stop - 1 - len(one.drafts) : stop]
                found[one.number] = verify(own_KV, one.guesses, one.state, one.request.stop_ids, one.request.logprobs)
        return found

    def _draft(self, drafter: Drafter, followed: Sequence[Followed], hidden_TD: Tensor) -> None:
        drafts = drafter.follow(self._runner.active, followed, hidden_TD)
        for part in followed:
            self._scheduler.publish(part.task)
            draft = drafts.get(part.task.number)
            if draft is not None:
                self._answers[part.task.number].guesses = [draft]
                part.task.drafts = [draft.token]

    def _accept_all(self, answer: _Answer, found: Verified | None, routing: tuple[Routing, ...] | None) -> list[Event]:
        """The events of one request in a step; what was read is told with the last of them."""
        events: list[Event] = []
        if found is not None:
            answer.drafted += len(answer.drafts)
            answer.accepted += found.kept
            self._drafted += len(answer.drafts)
            self._accepted += found.kept
            answer.drafts, answer.guesses = [], []
            for drawn in found.drawn:
                events.append(self._accept(answer, drawn))
                if events[-1].finish_reason is not None:
                    break
        if routing is None:
            return events
        if not events:
            return [Event(answer.number, routing=routing)]
        return [*events[:-1], replace(events[-1], routing=routing)]

    def _accept(self, answer: _Answer, drawn: Drawn | SoliError) -> Event:
        """The answer goes on, or ends, with what was drawn for it."""
        if isinstance(drawn, SoliError):
            return self._end(answer, "error", error=str(drawn))
        token, request = drawn.token, answer.request
        if token in request.stop_ids:
            return self._end(answer, "stop", answer.stream.finish())
        try:
            answer.state.accept(token)
        except SoliError as error:  # a dead end of the constraint
            return self._end(answer, "error", error=str(error))
        answer.ids.append(token)
        self._completion_tokens += 1
        text = answer.stream.push(token)
        reason: FinishReason | None = None
        if answer.stream.stopped:
            reason = "stop"
        elif answer.state.finished:
            reason, text = "stop", text + answer.stream.finish()
        elif answer.room == 0:
            reason, text = "length", text + answer.stream.finish()
        if reason is None:
            return Event(answer.number, token, text, drawn.logprob)
        return self._end(answer, reason, text, token, drawn)

    def _end(
        self,
        answer: _Answer,
        reason: FinishReason,
        text: str = "",
        token: int | None = None,
        drawn: Drawn | None = None,
        error: str | None = None,
    ) -> Event:
        self._scheduler.remove(answer)
        del self._answers[answer.number]
        logprob = drawn.logprob if drawn else None
        return Event(answer.number, token, text, logprob, None, reason, answer.usage, error)

    def _count(self, reads: Sequence[Read], layers: Sequence[Routing]) -> None:
        for read in reads:
            self._prompt_tokens += max(0, min(len(read.task.request.prompt_ids) - read.start, read.count))
        if len(layers) == len(self._load_LE) > 0:  # a layer may have been replaced since
            self._load_LE += count_choices(layers).cpu()

    def _new_routing(
        self, answer: _Answer, read: Read, stays: int, layers: Sequence[Routing], row: int
    ) -> tuple[Routing, ...] | None:
        """What the routers said of the read's tokens that stay, less those that were told before a preemption; they
        begin at `row` of the step."""
        end = read.start + stays
        first = max(answer.shown, read.start)
        if not answer.request.trace or end <= first:
            return None
        answer.shown = end
        return tuple(slice_routing(layer, row + first - read.start, row + stays) for layer in layers)

    def _muted(self, reads: Sequence[Read]) -> dict[int, Tensor] | None:
        """For each layer with mutes, which experts must not play for which tokens."""
        if not any(read.task.request.masked_experts for read in reads):
            return None
        tokens, start = sum(read.count for read in reads), 0
        masked_experts: dict[int, Tensor] = {}
        for read in reads:
            for layer, expert in read.task.request.masked_experts:
                if layer not in masked_experts:
                    masked_experts[layer] = torch.zeros(tokens, self._load_LE.shape[1], dtype=torch.bool)
                masked_experts[layer][start : start + read.count, expert] = True
            start += read.count
        return {layer: mask_TE.to(self._device) for layer, mask_TE in masked_experts.items()}
