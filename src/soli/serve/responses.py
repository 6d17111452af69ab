"""From the engine's events to responses: one body, or the chunks of a stream, with usage and the routers' decisions."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from soli.analysis.trace import TokenTrace, trace_tokens
from soli.chat.parser import CallDelta, MessageDelta
from soli.engine.request import Event, FinishReason, Request, Usage
from soli.engine.sampler import TokenLogprob
from soli.engine.text_model import TextModel
from soli.serve import protocol_responses as protocol
from soli.serve.echo import ListedToken, PromptEcho
from soli.serve.errors import ApiError
from soli.serve.prompts import RequestBatch
from soli.serve.service import Service


class ChoiceBuilder(Protocol):
    """One answer in one of the formats."""

    def push(self, event: Event) -> Any | None:
        """The piece of a stream that an event makes; None if it makes none."""

    def whole(self) -> Any:
        """Everything pushed so far, for a response that is not streamed."""


@dataclass(frozen=True)
class AnswerFormat:
    """The bodies of one route: whole responses and chunks, with their `object` fields."""

    id_prefix: str
    response: type[protocol.GenerationResponse]
    response_object: str
    chunk: type[protocol.GenerationChunk]
    chunk_object: str
    new_choice: Callable[[int, TextModel, RequestBatch], ChoiceBuilder]  # of an index


class ResponseBuilder:
    """One HTTP response to `batch`."""

    def __init__(self, service: Service, batch: RequestBatch, answer_format: AnswerFormat) -> None:
        self._batch = batch
        self._format = answer_format
        text_model = service.loaded.text_model
        self._choices = [answer_format.new_choice(index, text_model, batch) for index in range(len(batch.requests))]
        self._usages: list[Usage | None] = [None] * len(batch.requests)
        self._token_times: list[float] = []  # monotonic, of the first token and of the last one so far
        self._recorders = [RoutingRecorder(service, request) for request in batch.requests if batch.routing != "none"]
        self._head: dict[str, Any] = {
            "id": f"{answer_format.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }

    async def whole(self, events: AsyncGenerator[tuple[int, Event], None]) -> protocol.GenerationResponse:
        """The whole response, from the events of the batch's requests."""
        traces: list[list[TokenTrace]] = [[] for _ in self._choices]
        async with aclosing(events):
            async for index, event in events:
                self._choices[index].push(event)
                self._record(index, event)
                if self._recorders:
                    traces[index] += await self._recorders[index].push(event)
        choices = [choice.whole() for choice in self._choices]
        if self._batch.routing == "full":
            for choice, tokens in zip(choices, traces, strict=True):
                choice.soli = protocol.ChoiceRouting(tokens=tokens)
        return self._format.response(
            **self._head,
            object=self._format.response_object,
            choices=choices,
            usage=self._usage(),
            **self._summary(),
        )

    async def chunks(
        self, events: AsyncGenerator[tuple[int, Event], None]
    ) -> AsyncGenerator[protocol.GenerationChunk, None]:
        """The chunks of a stream, likewise."""
        new_chunk = self._format.chunk
        head = self._head | {"object": self._format.chunk_object}
        async with aclosing(events):
            async for index, event in events:
                traces = await self._recorders[index].push(event) if self._recorders else []
                piece = self._choices[index].push(event)
                if piece is not None or traces:
                    chunk = new_chunk(**head, choices=[] if piece is None else [piece])
                    if traces and self._batch.routing == "full":
                        chunk.soli = protocol.ChunkRouting(choice=index, tokens=traces)
                    yield chunk
                self._record(index, event)
        if self._batch.include_usage or self._recorders:
            usage: dict[str, Any] = {"usage": self._usage()} if self._batch.include_usage else {}
            yield new_chunk(**head, choices=[], **usage, **self._summary())

    def _record(self, index: int, event: Event) -> None:
        """Keeps the usage and when tokens came; an answer that failed is an error, not a short answer."""
        if event.token is not None:
            self._token_times[1:] = [time.monotonic()]
        self._usages[index] = event.usage or self._usages[index]
        if event.finish_reason == "error" and event.error_field is not None:
            param = self._batch.param_names.get(event.error_field)
            raise ApiError(400, event.error or "the answer failed", param)
        if event.finish_reason == "error":
            raise ApiError(500, event.error or "the answer failed")
        if event.finish_reason == "cancelled":
            raise ApiError(503, "the server is shutting down: ask again when it is back")

    def _usage(self) -> protocol.TokenUsage:
        """Tokens of all answers; a prompt counts once, however many answers it gets."""
        usages = [usage for usage in self._usages if usage is not None]
        of_prompts = usages[:: self._batch.choices_per_prompt]
        prompt_tokens = sum(usage.prompt for usage in of_prompts)
        completion_tokens = sum(usage.completion for usage in usages)
        later_tokens = completion_tokens - len(usages)
        seconds = self._token_times[-1] - self._token_times[0] if self._token_times else 0.0
        return protocol.TokenUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=protocol.PromptTokensDetails(cached_tokens=sum(usage.cached for usage in of_prompts)),
            completion_tokens_details=protocol.CompletionTokensDetails(
                accepted_prediction_tokens=sum(usage.accepted for usage in usages),
                rejected_prediction_tokens=sum(usage.drafted - usage.accepted for usage in usages),
            ),
            tokens_per_second=round(later_tokens / seconds, 1) if later_tokens > 0 and seconds > 0 else None,
        )

    def _summary(self) -> dict[str, Any]:
        """The `soli` field with routing "summary"."""
        if self._batch.routing != "summary":
            return {}
        return {"soli": protocol.RoutingSummary(experts=[recorder.counts() for recorder in self._recorders])}


class RoutingRecorder:
    """The routing of one answer: the traces of its tokens as they are read, and counts per layer and expert."""

    def __init__(self, service: Service, request: Request) -> None:
        self._statistics = service.expert_statistics
        self._text_model = service.loaded.text_model
        self._routers = [(name, moe.gate) for name, moe in self._text_model.model.moe_layers()]
        self._prompt_length = len(request.prompt_ids)
        self._ids = list(request.prompt_ids)
        self._labels = [self._text_model.label(token) for token in self._ids]
        self._tokens_read = 0
        self._counts: list[list[int]] = []  # per layer and expert

    async def push(self, event: Event) -> list[TokenTrace]:
        """The traces of the tokens read in an event's step."""
        traces = await asyncio.to_thread(self._trace, event) if event.routing else []
        if event.token is not None:
            self._ids.append(event.token)
            self._labels.append(self._text_model.label(event.token))
        return traces

    def counts(self) -> list[protocol.ExpertCounts]:
        """How often each expert was selected, layer by layer."""
        return [
            protocol.ExpertCounts(layer=name, counts=counts)
            for (name, _), counts in zip(self._routers, self._counts, strict=False)
        ]

    def _trace(self, event: Event) -> list[TokenTrace]:
        routing = event.routing or ()
        traces = trace_tokens(
            self._routers, routing, self._ids, self._labels, self._prompt_length, start=self._tokens_read
        )
        self._tokens_read += len(traces)
        step_counts = [layer.counts_E().tolist() for layer in routing]
        totals = self._counts or [[0] * len(counts) for counts in step_counts]
        self._counts = [
            [total + count for total, count in zip(layer_totals, counts, strict=True)]
            for layer_totals, counts in zip(totals, step_counts, strict=True)
        ]
        self._statistics.add(traces)
        return traces


@dataclass
class CompletionChoiceBuilder:
    """A choice of /v1/completions and /soli/translate. `echo`: of the prompt, at the head of the text."""

    index: int
    text_model: TextModel
    echo: PromptEcho | None = None
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    logprobs: list[ListedToken] = field(default_factory=list)

    def push(self, event: Event) -> protocol.CompletionChunkChoice | None:
        text, logprobs = ("", []) if self.echo is None else self.echo.push(event)
        self._add(event.logprob, len(self.text + text), logprobs)
        text += event.text
        if self.echo is not None:
            self._add(event.stop_logprob, len(self.text + text), logprobs)
        self.text += text
        self.logprobs += logprobs
        self.finish_reason = event.finish_reason
        self.stop_string = event.stop_string
        if not (text or logprobs or event.finish_reason):
            return None
        return protocol.CompletionChunkChoice(**self._fields(text, logprobs))

    def whole(self) -> protocol.CompletionChoice:
        return protocol.CompletionChoice(**self._fields(self.text, self.logprobs))

    @staticmethod
    def _add(logprob: TokenLogprob | None, offset: int, tokens: list[ListedToken]) -> None:
        if logprob is not None:
            tokens.append(ListedToken(logprob.token, offset, logprob))

    def _fields(self, text: str, logprobs: Sequence[ListedToken]) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": text,
            "logprobs": self._describe(logprobs) if logprobs else None,
            "finish_reason": self.finish_reason,
            **stop_reason(self.stop_string),
        }

    def _describe(self, logprobs: Sequence[ListedToken]) -> protocol.CompletionLogprobs:
        return protocol.CompletionLogprobs(
            tokens=[token_name(self.text_model, one.token) for one in logprobs],
            token_logprobs=[None if one.logprob is None else one.logprob.logprob for one in logprobs],
            top_logprobs=[None if one.logprob is None else self._top(one.logprob) for one in logprobs],
            text_offset=[one.offset for one in logprobs],
        )

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the token itself if there are any."""
        tokens = dict(logprob.top)
        if tokens:
            tokens.setdefault(logprob.token, logprob.logprob)
        return {token_name(self.text_model, token): value for token, value in tokens.items()}


class ChatChoiceBuilder:
    """A choice of /v1/chat/completions: reasoning and tool calls apart from the answer's text."""

    def __init__(self, index: int, text_model: TextModel, batch: RequestBatch) -> None:
        self._index = index
        self._text_model = text_model
        self._parser = batch.new_parser()
        self._has_role = False  # whether a delta has said the role
        self._content = ""
        self._reasoning = ""
        self._calls: list[protocol.ToolCall] = []
        self._logprobs: list[protocol.SampledTokenLogprob] = []
        self._finish_reason: FinishReason | Literal["tool_calls"] | None = None
        self._stop_string: str | None = None

    def push(self, event: Event) -> protocol.ChatChunkChoice | None:
        last = event.finish_reason is not None
        fields = self._delta_fields(self._parser.push(event.text, last))
        logprobs = [] if event.logprob is None else [self._sampled(event.logprob)]
        self._logprobs += logprobs
        self._stop_string = event.stop_string
        if last:
            called_tools = event.finish_reason == "stop" and self._calls
            self._finish_reason = "tool_calls" if called_tools else event.finish_reason
        if not (fields or logprobs or last):
            return None
        if not self._has_role:
            self._has_role = True
            fields = {"role": "assistant", "content": ""} | fields
        return protocol.ChatChunkChoice(
            index=self._index,
            delta=protocol.ChatDelta(**fields),
            logprobs=protocol.ChatLogprobs(content=logprobs) if logprobs else None,
            finish_reason=self._finish_reason,
            **stop_reason(self._stop_string),
        )

    def whole(self) -> protocol.ChatChoice:
        parts: dict[str, Any] = {
            "reasoning_content": self._reasoning,
            "tool_calls": self._calls,
        }
        assert self._finish_reason in ("stop", "length", "tool_calls")  # a failed answer is an error
        return protocol.ChatChoice(
            index=self._index,
            message=protocol.AssistantMessage(
                role="assistant",
                content=self._content or (None if self._calls else ""),
                **{name: value for name, value in parts.items() if value},
            ),
            logprobs=protocol.ChatLogprobs(content=self._logprobs) if self._logprobs else None,
            finish_reason=self._finish_reason,
            **stop_reason(self._stop_string),
        )

    def _delta_fields(self, delta: MessageDelta) -> dict[str, Any]:
        """The fields of a ChatDelta that are not empty."""
        self._reasoning += delta.reasoning
        self._content += delta.content
        fields = {
            "reasoning_content": delta.reasoning,
            "content": delta.content,
            "tool_calls": [self._add_call(call) for call in delta.tool_calls],
        }
        return {name: value for name, value in fields.items() if value}

    def _add_call(self, delta: CallDelta) -> protocol.ToolCallDelta:
        if delta.name is None:
            self._calls[delta.index].function.arguments += delta.arguments
            function = protocol.CalledFunctionDelta(arguments=delta.arguments)
            return protocol.ToolCallDelta(index=delta.index, function=function)
        call_id = delta.call_id or f"call_{secrets.token_hex(12)}"
        function = protocol.CalledFunctionDelta(name=delta.name, arguments=delta.arguments)
        called = protocol.CalledFunction(name=delta.name, arguments=delta.arguments)
        self._calls.append(protocol.ToolCall(id=call_id, type="function", function=called))
        return protocol.ToolCallDelta(index=delta.index, id=call_id, type="function", function=function)

    def _sampled(self, drawn: TokenLogprob) -> protocol.SampledTokenLogprob:
        top = [protocol.ChatTokenLogprob(**self._token_fields(token, logprob)) for token, logprob in drawn.top]
        return protocol.SampledTokenLogprob(**self._token_fields(drawn.token, drawn.logprob), top_logprobs=top)

    def _token_fields(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_name(self._text_model, token),
            "logprob": logprob,
            "bytes": list(self._text_model.tokenizer.token_bytes(token)),
        }


def stop_reason(stop_string: str | None) -> dict[str, Any]:
    """The field of a choice whose text a stop string ended."""
    return {} if stop_string is None else {"stop_reason": stop_string}


def token_name(text_model: TextModel, token: int) -> str:
    """A token in logprobs: its text; bytes that are not whole characters in OpenAI's notation, `bytes:\\xe4\\xb8`."""
    token_bytes = text_model.tokenizer.token_bytes(token)
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def new_completion_choice(index: int, text_model: TextModel, batch: RequestBatch) -> CompletionChoiceBuilder:
    """The builder of choice `index` of a batch."""
    if not batch.prompt_texts:
        return CompletionChoiceBuilder(index, text_model)
    prompt = batch.prompt_texts[index // batch.choices_per_prompt]
    return CompletionChoiceBuilder(index, text_model, PromptEcho(prompt, batch.requests[index].logprobs is not None))


COMPLETION = AnswerFormat(
    "cmpl",
    protocol.CompletionResponse,
    "text_completion",
    protocol.CompletionChunk,
    "text_completion",
    new_completion_choice,
)
TRANSLATION = replace(
    COMPLETION,
    response=protocol.TranslationResponse,
    response_object="soli.translation",
    chunk=protocol.TranslationChunk,
    chunk_object="soli.translation",
)
CHAT = AnswerFormat(
    "chatcmpl",
    protocol.ChatResponse,
    "chat.completion",
    protocol.ChatChunk,
    "chat.completion.chunk",
    ChatChoiceBuilder,
)
