"""A model as Python uses it: prompts in, whole answers or their pieces out, from any thread or event loop.

    llm = soli.LLM("nano")
    [answer] = llm.generate("Good morning", temperature=0.7, seed=1, max_tokens=40)
    [translation] = llm.translate("Good morning")
    [likeliest] = llm.beam_search("Good morning", beam_width=4, max_tokens=40)

Requests of the same time, in one call or in several, are computed together by one engine (soli/engine). Options are
Soli's, OpenAI's or vLLM's (soli/engine/options.py); what is not known is rejected by name. SoliError for a request that
the engine rejects, before anything is computed for it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from soli.analysis.notebook_views import html_text
from soli.analysis.parameters import count
from soli.arguments import checks_arguments, without_neutral
from soli.chat.answer import ChatAnswer, ChatPrompt, Messages, conversations, parse_answer, render_chat
from soli.chat.templates import ChatTemplate
from soli.checkpoint import open_checkpoint
from soli.checkpoint.writer import ProgressCallback
from soli.data.text import Language
from soli.data.tokenizer import Tokenizer
from soli.engine.async_engine import AsyncEngine, Events
from soli.engine.beam_search import BeamSearchParams, beam_search_params, options_beams_lack
from soli.engine.engine import Engine
from soli.engine.options import (
    BeamSearchOptions,
    GenerationOptions,
    GenerationSettings,
    read_beam_search_options,
    read_options,
)
from soli.engine.request import Answer, EngineLimits, EngineStats, Event, Request, checked
from soli.engine.runner import RunnerName
from soli.engine.sampler import SamplingParams
from soli.errors import SoliError
from soli.eval.translation import (
    Translation,
    one_line,
    translation_beams,
    translation_request,
    translation_target,
)
from soli.llm_arguments import (
    CHAT_NEUTRAL,
    EXPECTED,
    HINTS,
    NEUTRAL,
    check_one_answer,
    model_with_tokenizer,
    prompt_list,
    text_list,
)
from soli.model.transformer import Transformer
from soli.quantities import scaled
from soli.sections import shown

DEFAULT_BEAMS = 4
NEW_TOKENS = 256  # unless max_new_tokens says otherwise, within the model's positions

Prompt = str | Sequence[int]


class LLM:
    """A loaded model with its engine.

    `model`: a folder, "nano", the ID of a downloaded model, or a Transformer with its `tokenizer`; a Transformer may be
    hooked, patched or trained on between requests. `device`, `dtype`: of a folder, as `open_text_model` says. `limits`:
    memory and batch sizes. `runner`: "eager" calls the modules one after another; "fused" computes all layers in one
    C++ call, or is a SoliError; "auto" is fused where it can be. `memory`: bytes, or a size as "16GB", that the model
    may take; experts that do not fit are read from disk as they are needed. `progress` is called with the bytes of a
    folder that are read and all. Under torchrun each rank holds a part of a folder's model; ranks other than the first
    do not return from here.

    `sampling` of its methods is a SamplingParams, or None, which is as the folder's generation_config.json says, else
    greedy; instead of it, `options` may have its fields as keywords. top_k, top_p, min_p or n without a temperature
    mean a temperature of 1, unless the folder has one.
    """

    @checks_arguments("soli.LLM", HINTS, NEUTRAL, EXPECTED)
    def __init__(
        self,
        model: str | Path | Transformer,
        *,
        tokenizer: Tokenizer | None = None,
        device: str | torch.device = "cpu",
        dtype: str = "auto",
        limits: EngineLimits | None = None,
        runner: RunnerName = "auto",
        memory: int | str | None = None,
        progress: ProgressCallback = lambda read, total: None,
    ) -> None:
        limits = limits or EngineLimits()
        self.name = type(model).__name__ if isinstance(model, Transformer) else str(model)
        self._has_folder = not isinstance(model, Transformer)
        self.text_model = model_with_tokenizer(model, tokenizer, str(device), dtype, limits.speculate, progress, memory)
        self.engine = AsyncEngine(Engine(self.text_model, limits, runner=runner))
        self._max_pending = max(1, limits.max_waiting)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Answer]:
        """Answers to one text or many prompts, in their order; with n, each prompt's n one after another. A text gets
        the beginning of the model's documents; token ids are used unchanged."""
        return self._answers(self._requests(prompts, read_options("generate", sampling, options, self._defaults)))

    async def generate_async(
        self,
        prompts: str | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Answer]:
        """`generate` for an event loop."""
        slots = asyncio.Semaphore(self._max_pending)

        async def one(request: Request) -> Answer:
            async with slots:
                return Answer.from_events(request, [event async for event in await self.engine.submit(request)])

        requests = self._requests(prompts, read_options("generate_async", sampling, options, self._defaults))
        tasks = [asyncio.ensure_future(one(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def beam_search(
        self,
        prompts: str | Sequence[Prompt],
        params: BeamSearchParams | None = None,
        *,
        beam_width: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | Literal["never"] | None = None,
        **options: Unpack[BeamSearchOptions],
    ) -> list[Answer]:
        """The likeliest answer to one text or each of many prompts, in their order, by a beam search; its `hypotheses`
        are the `beam_width` best, with their scores.

        `params`, or its fields as keywords, say how to search; by default as the folder's generation_config.json, else
        with 4 beams. Nothing is sampled: options that only sampling has are rejected. SoliError for more beams than the
        engine runs sequences (`limits.max_running`).
        """
        settings = read_beam_search_options("beam_search", options)
        values = (beam_width, length_penalty, early_stopping)
        if params is not None and (not isinstance(params, BeamSearchParams) or any(one is not None for one in values)):
            raise SoliError(
                f"the argument params of beam_search is {shown(params)}: give a BeamSearchParams, or beam_width, "
                "length_penalty and early_stopping instead"
            )
        default = params or self.text_model.beam_search or BeamSearchParams(DEFAULT_BEAMS)
        search = beam_search_params(default, *values)
        return self._answers(replace(one, beam_search=search) for one in self._requests(prompts, settings))

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[GenerationOptions]
    ) -> Iterator[Event]:
        """One answer's events as they come, each with `event.text`. Closed before its end, it is cancelled."""
        request = self._single("stream", prompt, sampling, options)

        def events() -> Iterator[Event]:
            yield from map(checked, self.engine.open(request))

        return events()

    def stream_async(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[GenerationOptions]
    ) -> AsyncIterator[Event]:
        """`stream` for an event loop."""
        request = self._single("stream_async", prompt, sampling, options)

        async def events() -> AsyncIterator[Event]:
            async for event in await self.engine.submit(request):
                yield checked(event)

        return events()

    def request(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[GenerationOptions]
    ) -> Request:
        """The engine's request for a prompt; `max_new_tokens` is 256 by default, or what the model has room for."""
        return self._single("request", prompt, sampling, options)

    def translate(
        self,
        texts: str | Sequence[str],
        to: Language | None = None,
        sampling: SamplingParams | None = None,
        *,
        beam_width: int | None = None,
        length_penalty: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Translation]:
        """Translations of one text or many, each as one line, in their order: English to Chinese and Chinese to English
        unless `to` is "en" or "zh". An empty text stays empty. For models trained for it, as the bundled one is.

        By a search with `beam_width` beams, or greedily with 1; by default as the folder's generation_config.json says,
        unless there are options that a beam search does not take."""
        settings = read_options("translate", sampling, options)
        check_one_answer("translate", settings)
        if to not in (None, "en", "zh"):
            raise SoliError(f"cannot translate to {shown(to)}: choose en or zh")
        sources = text_list(texts)
        targets = [translation_target(text, to) for text in sources]
        search = translation_beams(self.text_model, beam_width, length_penalty, bool(options_beams_lack(settings)))
        requests = (
            self._request(settings, *translation_request(self.text_model, text, target))
            for text, target in zip(sources, targets, strict=True)
            if target is not None
        )
        answers = iter(self._answers(replace(request, beam_search=search) for request in requests))
        return [
            Translation(text, "", None) if target is None else _translation(text, target, next(answers))
            for text, target in zip(sources, targets, strict=True)
        ]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[ChatAnswer]:
        """Answers to one conversation or several, by the folder's chat template, in their order; with n, each one's n
        one after another. `answer.message` continues the conversation.

        `tools`: as in OpenAI's API; the model calls them or not. `chat_template_kwargs`: variables of the template.
        max_new_tokens is by default as many as the model has room for.
        """
        settings = read_options("chat", sampling, without_neutral("chat", options, CHAT_NEUTRAL), self._defaults)
        if settings.constraint is not None and tools:
            raise SoliError("a constrained answer cannot call tools: leave tools or constraint out")
        prompts = [
            render_chat(self._chat_template, conversation, tools, chat_template_kwargs, settings.constraint is not None)
            for conversation in conversations(messages)
        ]
        requests = [
            replace(self._chat_request(settings, prompt), sampling=settings.sampling.for_choice(choice))
            for prompt in prompts
            for choice in range(settings.n)
        ]
        parsers = [prompt.new_parser() for prompt in prompts for _ in range(settings.n)]
        answers = self._answers(requests)
        return [parse_answer(answer, parser) for answer, parser in zip(answers, parsers, strict=True)]

    def stats(self) -> EngineStats:
        """The engine's metrics."""
        return self.engine.stats()

    def close(self) -> None:
        """End the engine's thread and the template's processes; later requests are rejected. The model is freed with
        this object."""
        self.engine.close()
        if self.text_model.leader is not None:
            self.text_model.leader.close()
        if self.text_model.budget is not None:
            self.text_model.budget.remember()
        if "_chat_template" in vars(self):
            self._chat_template.close()

    def __repr__(self) -> str:
        return f"<soli.LLM {self.name}: {', '.join(self._description())}>"

    def _repr_html_(self) -> str:
        return html_text(f"{self.name}\n" + "\n".join(self._description()))

    def _description(self) -> list[str]:
        """Size, experts, place and runner, a phrase each."""
        model = self.text_model.model
        config, weight = model.config, model.embed_tokens.weight
        size = count(config)
        phrases = [f"{scaled(size.total)} parameters", f"{scaled(size.activated)} activated for each token"]
        if config.num_moe_layers:
            experts = f"{config.num_experts_per_tok} of {config.n_routed_experts} experts"
            phrases.append(f"{experts} selected in each of {config.num_moe_layers} layers")
        dtype = str(model.compute_dtype or weight.dtype).removeprefix("torch.")
        return [*phrases, f"{self.text_model.positions:,} positions", f"{dtype} on {weight.device}"]

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        """The folder's; SoliError for a model without one."""
        folder = open_checkpoint(self.name).folder if self._has_folder else None
        template = None if folder is None else ChatTemplate.from_folder(folder, self.text_model.tokenizer)
        if template is None:
            raise SoliError(f"{self.name} has no chat template, so it was not trained to chat: use generate")
        return template

    def _chat_request(self, settings: GenerationSettings, prompt: ChatPrompt) -> Request:
        limit = self.text_model.remaining_tokens(prompt.token_ids, "the conversation")
        request = self._request(settings, prompt.token_ids, limit)
        constraint = request.constraint or prompt.constraint
        return replace(request, visible_ids=request.visible_ids | prompt.visible_ids, constraint=constraint)

    def _answers(self, requests: Iterable[Request]) -> list[Answer]:
        """Answers in order; as many requests wait as may."""
        answers: list[Answer] = []
        pending: deque[tuple[Request, Events]] = deque()
        for request in requests:
            if len(pending) == self._max_pending:
                answers.append(Answer.from_events(*pending.popleft()))
            pending.append((request, self.engine.open(request)))
        return answers + [Answer.from_events(request, events) for request, events in pending]

    def _requests(self, prompts: str | Sequence[Prompt], settings: GenerationSettings) -> Iterator[Request]:
        """Each prompt's n requests."""
        for prompt in prompt_list(prompts):
            request = self._request(settings, self._prompt_ids(prompt, settings))
            for choice in range(settings.n):
                yield replace(request, sampling=request.sampling.for_choice(choice))

    def _single(
        self, method: str, prompt: Prompt, sampling: SamplingParams | None, options: Mapping[str, Any]
    ) -> Request:
        settings = read_options(method, sampling, options, self._defaults)
        check_one_answer(method, settings)
        return self._request(settings, self._prompt_ids(prompt, settings))

    @property
    def _defaults(self) -> Mapping[str, Any]:
        return self.text_model.sampling_defaults

    def _prompt_ids(self, prompt: Any, settings: GenerationSettings) -> Sequence[int]:
        """The tokens of a prompt: a text's, or a list of ids as it is."""
        if isinstance(prompt, str):
            return self.text_model.text_prompt(prompt, settings.parse_special)
        ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(ids, list | tuple) or any(type(token) is not int for token in ids):
            raise SoliError(f"a prompt is {shown(prompt)}: give a text, or a list of token ids")
        return ids

    def _request(self, settings: GenerationSettings, prompt_ids: Sequence[int], limit: int | None = None) -> Request:
        """`limit`: of new tokens, where the settings have none."""
        model = self.text_model
        vocab_size = model.model.config.vocab_size
        outside = [token for token in settings.stop_token_ids if not 0 <= token < vocab_size]
        if outside:
            raise SoliError(f"stop_token_ids has {outside[0]}, but the model's tokens go from 0 to {vocab_size - 1}")
        if settings.max_new_tokens is not None:
            limit = settings.max_new_tokens
        elif limit is None:
            limit = min(NEW_TOKENS, model.remaining_tokens(prompt_ids, "the prompt"))
        return Request(
            tuple(prompt_ids),
            max_new_tokens=limit,
            sampling=settings.sampling,
            stop_ids=settings.stop_token_ids | (frozenset() if settings.ignore_eos else model.stop_ids),
            stop=settings.stop,
            logprobs=settings.logprobs,
            prompt_logprobs=settings.prompt_logprobs,
            trace=settings.trace,
            masked_experts=settings.masked_experts,
            constraint=settings.constraint,
            min_new_tokens=settings.min_new_tokens,
            visible_ids=frozenset() if settings.skip_special_tokens else model.tokenizer.special_ids,
        )


def _translation(source: str, to: Language, answer: Answer) -> Translation:
    return Translation(source, one_line(answer.text), to, answer)
