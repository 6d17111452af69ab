"""Answers as they go out: one body, or chunks of a stream, with usage and with what the routers decided."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from soli.analysis.trace import TokenTrace, trace_tokens
from soli.engine.request import Event, Request, Usage
from soli.serve.choices import Choice
from soli.serve.errors import ApiError
from soli.serve.prompts import Asked
from soli.serve.service import Loaded, Service


class Played:
    """The routing of one answer: its tokens' traces as they are read, and counts per layer and expert."""

    def __init__(self, service: Service, loaded: Loaded, request: Request) -> None:
        self._log, self._text_model = service.experts, loaded.text_model
        self._routers = [(name, moe.gate) for name, moe in loaded.text_model.model.moe_layers()]
        self._prompt = len(request.prompt_ids)
        self._ids = list(request.prompt_ids)
        self._labels = [self._text_model.label(token) for token in self._ids]
        self._told = 0
        self._counts: list[list[int]] = []

    async def push(self, event: Event) -> list[TokenTrace]:
        """The traces that an event brings."""
        traces = await asyncio.to_thread(self._traces, event) if event.routing else []
        if event.token is not None:
            self._ids.append(event.token)
            self._labels.append(self._text_model.label(event.token))
        return traces

    def summary(self) -> list[dict[str, Any]]:
        """How often each expert played, layer by layer."""
        named = zip(self._routers, self._counts, strict=False)
        return [{"layer": name, "counts": counts} for (name, _), counts in named]

    def _traces(self, event: Event) -> list[TokenTrace]:
        routing = event.routing or ()
        traces = trace_tokens(self._routers, routing, self._ids, self._labels, self._prompt, start=self._told)
        self._told += len(traces)
        new = [part.counts_E().tolist() for part in routing]
        old = self._counts or [[0] * len(counts) for counts in new]
        self._counts = [[a + b for a, b in zip(one, two, strict=True)] for one, two in zip(old, new, strict=True)]
        self._log.add(traces, self._labels)
        return traces


class Answer:
    """One HTTP answer to `asked`. `kind`: OpenAI's object name; `make` makes the choice of an index."""

    def __init__(self, service: Service, asked: Asked, kind: str, make: Callable[[int], Choice]) -> None:
        self._service, self._asked, self._kind = service, asked, kind
        self._choices = [make(index) for index in range(len(asked.requests))]
        self._usages: list[Usage | None] = [None] * len(asked.requests)
        traced = asked.options.routing != "none"
        self._played = [Played(service, service.loaded, one) for one in asked.requests] if traced else []
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}

    async def whole(self) -> dict[str, Any]:
        """The answer in one body."""
        traces: list[list[TokenTrace]] = [[] for _ in self._choices]
        async with aclosing(await self._play()) as events:
            async for place, event in events:
                self._choices[place].push(event)
                self._end(place, event)
                if self._played:
                    traces[place] += await self._played[place].push(event)
        choices = [choice.whole() for choice in self._choices]
        if self._asked.options.routing == "full":
            for choice, tokens in zip(choices, traces, strict=True):
                choice["soli"] = {"tokens": [asdict(token) for token in tokens]}
        body = self._head | {"object": self._kind, "choices": choices, "usage": self._usage()}
        return body | self._summary()

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream, once the engine has taken all requests: what is refused is refused before."""
        return self._chunks(await self._play())

    async def _play(self) -> AsyncGenerator[tuple[int, Event], None]:
        return await self._service.play(self._asked.requests, self._asked.params)

    async def _chunks(self, events: AsyncGenerator[tuple[int, Event], None]) -> AsyncGenerator[dict[str, Any], None]:
        head = self._head | {"object": "chat.completion.chunk" if self._kind.startswith("chat") else self._kind}
        async with aclosing(events):
            async for place, event in events:
                traces = await self._played[place].push(event) if self._played else []
                piece = self._choices[place].push(event)
                if piece is not None or traces:
                    chunk = head | {"choices": [piece] if piece is not None else []}
                    if traces and self._asked.options.routing == "full":
                        chunk["soli"] = {"choice": place, "tokens": [asdict(token) for token in traces]}
                    yield chunk
                self._end(place, event)
        if self._asked.usage_chunk or self._played:
            usage = {"usage": self._usage()} if self._asked.usage_chunk else {}
            yield head | {"choices": []} | usage | self._summary()

    def _end(self, place: int, event: Event) -> None:
        """Remembers what the last event says; an answer that failed is an error, not a short answer."""
        self._usages[place] = event.usage or self._usages[place]
        if event.finish_reason == "error":
            raise ApiError(500, event.error or "the answer failed")
        if event.finish_reason == "cancelled":
            raise ApiError(503, "the server is shutting down: ask again when it is back")

    def _usage(self) -> dict[str, Any]:
        """Tokens of all answers; a prompt counts once however many answers it gets."""
        usages = [usage for usage in self._usages if usage is not None]
        prompt = sum(usage.prompt for usage in usages[:: self._asked.choices])
        completion = sum(usage.completion for usage in usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached for usage in usages[:: self._asked.choices])},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(usage.accepted for usage in usages),
                "rejected_prediction_tokens": sum(usage.drafted - usage.accepted for usage in usages),
            },
        }

    def _summary(self) -> dict[str, Any]:
        if self._asked.options.routing != "summary":
            return {}
        return {"soli": {"experts": [played.summary() for played in self._played]}}
