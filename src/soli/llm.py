"""A model as Python uses it: prompts in, whole answers or their pieces out, from any thread or event loop.

    llm = soli.LLM("nano")
    [answer] = llm.generate("Good morning", soli.SamplingParams(temperature=0.7, seed=1), max_new_tokens=40)

Requests of the same time, in one call or in several, are computed together by one engine (soli/engine). SoliError for a
request that the engine rejects, before anything is computed for it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from soli.checkpoint.writer import ProgressCallback
from soli.data.tokenizer import Tokenizer
from soli.engine.async_engine import AsyncEngine, Events
from soli.engine.constraint import ConstraintSpec
from soli.engine.engine import Engine
from soli.engine.request import Answer, EngineLimits, EngineStats, Event, Request, checked
from soli.engine.runner import RunnerName
from soli.engine.sampler import GREEDY, SamplingParams
from soli.engine.text_model import TextModel, open_text_model, text_model
from soli.errors import SoliError
from soli.model.transformer import Transformer

NEW_TOKENS = 256  # unless max_new_tokens says otherwise, within the model's positions

Prompt = str | Sequence[int]


class Options(TypedDict, total=False):
    """Options of a request besides its sampling; soli.engine.request.Request describes each."""

    max_new_tokens: int
    stop: Sequence[str]
    logprobs: int
    trace: bool
    masked_experts: Collection[tuple[int, int]]
    constraint: ConstraintSpec


class LLM:
    """A loaded model with its engine.

    `model`: a folder, "nano", or a Transformer with its `tokenizer`; a Transformer may be hooked, patched or trained on
    between requests. `device`, `dtype`: of a folder, as `open_text_model` says. `limits`: memory and batch sizes.
    `runner`: "eager" calls the modules one after another; "fused" computes all layers in one C++ call, or is a
    SoliError; "auto" is fused where it can be. `progress` is called with the bytes of a folder that are read and all.
    """

    def __init__(
        self,
        model: str | Path | Transformer,
        *,
        tokenizer: Tokenizer | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        limits: EngineLimits | None = None,
        runner: RunnerName = "auto",
        progress: ProgressCallback = lambda read, total: None,
    ) -> None:
        limits = limits or EngineLimits()
        self.text_model = _text_model(model, tokenizer, device, dtype, limits.speculate, progress)
        self.engine = AsyncEngine(Engine(self.text_model, limits, runner=runner))
        self._max_pending = max(1, limits.max_waiting)

    def generate(
        self, prompts: str | Sequence[Prompt], sampling: SamplingParams = GREEDY, **options: Unpack[Options]
    ) -> list[Answer]:
        """Answers to one text or many prompts, in their order. A text gets the beginning of the model's documents;
        token ids are used unchanged."""
        answers: list[Answer] = []
        pending: deque[tuple[Request, Events]] = deque()
        for request in self._requests(prompts, sampling, options):
            if len(pending) == self._max_pending:
                answers.append(Answer.from_events(*pending.popleft()))
            pending.append((request, self.engine.open(request)))
        return answers + [Answer.from_events(request, events) for request, events in pending]

    async def generate_async(
        self, prompts: str | Sequence[Prompt], sampling: SamplingParams = GREEDY, **options: Unpack[Options]
    ) -> list[Answer]:
        """`generate` for an event loop."""
        slots = asyncio.Semaphore(self._max_pending)

        async def one(request: Request) -> Answer:
            async with slots:
                return Answer.from_events(request, [event async for event in await self.engine.submit(request)])

        tasks = [asyncio.ensure_future(one(request)) for request in self._requests(prompts, sampling, options)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def stream(self, prompt: Prompt, sampling: SamplingParams = GREEDY, **options: Unpack[Options]) -> Iterator[Event]:
        """One answer's events as they come, each with `event.text`. Closed before its end, it is cancelled."""
        yield from map(checked, self.engine.open(self.request(prompt, sampling, **options)))

    async def stream_async(
        self, prompt: Prompt, sampling: SamplingParams = GREEDY, **options: Unpack[Options]
    ) -> AsyncIterator[Event]:
        """`stream` for an event loop."""
        async for event in await self.engine.submit(self.request(prompt, sampling, **options)):
            yield checked(event)

    def request(self, prompt: Prompt, sampling: SamplingParams = GREEDY, **options: Unpack[Options]) -> Request:
        """The engine's request for a prompt; `max_new_tokens` is 256 by default, or what the model has room for."""
        ids = tuple(self.text_model.text_prompt(prompt) if isinstance(prompt, str) else prompt)
        limit = options.get("max_new_tokens")
        if limit is None:
            limit = min(NEW_TOKENS, self.text_model.remaining_tokens(ids, "the prompt"))
        return Request(
            ids,
            max_new_tokens=limit,
            sampling=sampling,
            stop_ids=self.text_model.stop_ids,
            stop=tuple(options.get("stop", ())),
            logprobs=options.get("logprobs"),
            trace=options.get("trace", False),
            masked_experts=frozenset(options.get("masked_experts", ())),
            constraint=options.get("constraint"),
        )

    def stats(self) -> EngineStats:
        """The engine's metrics."""
        return self.engine.stats()

    def close(self) -> None:
        """End the engine's thread; later requests are rejected. The model is freed with this object."""
        self.engine.close()

    def _requests(
        self, prompts: str | Sequence[Prompt], sampling: SamplingParams, options: Options
    ) -> Iterator[Request]:
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            yield self.request(prompt, sampling, **options)


def _text_model(
    model: str | Path | Transformer,
    tokenizer: Tokenizer | None,
    device: str,
    dtype: str,
    mtp: bool,
    progress: ProgressCallback,
) -> TextModel:
    if isinstance(model, Transformer):
        if tokenizer is None:
            raise SoliError("a Transformer needs its tokenizer: give tokenizer=soli.data.tokenizer.Tokenizer")
        return text_model(model, tokenizer)
    if not isinstance(model, str | Path):
        raise SoliError(f"model is a {type(model).__name__}: give a folder, nano, or a soli.model.Transformer")
    if tokenizer is not None:
        raise SoliError("a folder has its own tokenizer: give tokenizer= with a Transformer alone")
    return open_text_model(str(model), device, dtype, mtp, progress)
