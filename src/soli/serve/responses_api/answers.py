"""Answers of the Responses API from the chunks of a chat: events, and the response that they make up.

Items come in the order in which the model wrote them: reasoning, message, calls. A whole response is what its own
events make, so that a streamed one cannot differ from it.
"""

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any, Literal

from pydantic import BaseModel

from soli.engine.sampler import SamplingParams
from soli.serve import protocol_responses as protocol
from soli.serve.errors import ApiError
from soli.serve.responses_api.requests import ResponsesBody

PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputItem(BaseModel):
    """`type` message has `role` and `content`, reasoning `summary` and `content`, function_call `call_id`, `name` and
    `arguments`."""

    id: str
    type: Literal["reasoning", "message", "function_call"]
    status: Status
    role: str = "assistant"
    summary: list[Any] = []
    content: list[dict[str, Any]] = []
    call_id: str = ""
    name: str = ""
    arguments: str = ""


class ResponseUsage(BaseModel):
    """`input_tokens_details` has `cached_tokens`, `output_tokens_details` `reasoning_tokens`."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """The answer of POST /v1/responses: what was asked for, and the items of the output."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None


class ResponseEvent(BaseModel):
    """An event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None
    output_index: int = 0
    content_index: int = 0
    item_id: str = ""
    item: OutputItem | None = None
    part: dict[str, Any] = {}
    delta: str = ""
    text: str = ""
    arguments: str = ""
    name: str = ""
    logprobs: list[Any] = []
    message: str = ""
    code: str | None = None
    param: str | None = None


class ResponseItemsBuilder:
    """Turns the chunks of one chat, sampled as `sampling` says, into events, and keeps the response that they make up.
    `count_tokens`: of a text."""

    def __init__(
        self, body: ResponsesBody, model: str, sampling: SamplingParams, count_tokens: Callable[[str], int]
    ) -> None:
        self.response = _response(body, model, sampling)
        self._count_tokens = count_tokens
        self._with_logprobs = "message.output_text.logprobs" in (body.include or ()) or bool(body.top_logprobs)
        self._sequence_number = -1
        self._call = -1  # index of the call that is open
        self._open: OutputItem | None = None
        self._finish_reason: str | None = None

    async def events(
        self, chunks: AsyncGenerator[protocol.GenerationChunk, None]
    ) -> AsyncGenerator[ResponseEvent, None]:
        """The events of a stream."""
        async with aclosing(chunks):
            yield self._event("response.created", response=self._snapshot())
            yield self._event("response.in_progress", response=self._snapshot())
            async for chunk in chunks:
                if chunk.usage is not None:
                    self.response.usage = self._usage(chunk.usage)
                for choice in chunk.choices:
                    for event in self._choice_events(choice):
                        yield event
            self._set_status()
            yield self._event(f"response.{self.response.status}", response=self._snapshot())

    async def whole(self, chunks: AsyncGenerator[protocol.GenerationChunk, None]) -> ResponseObject:
        """The response, whole."""
        async for _ in self.events(chunks):
            pass
        return self.response

    def failure(self, error: ApiError) -> ResponseEvent:
        """The last event of a stream that failed."""
        self.response.status = "failed"
        code = error.code or ("server_error" if error.status >= 500 else "invalid_prompt")
        self.response.error = {"code": code, "message": str(error)}
        return self._event("response.failed", response=self._snapshot())

    def _choice_events(self, choice: protocol.ChatChunkChoice) -> Iterator[ResponseEvent]:
        delta = choice.delta
        if delta.reasoning_content:
            yield from self._text_events("reasoning", delta.reasoning_content, [])
        logprobs = [one.model_dump() for one in choice.logprobs.content] if choice.logprobs else []
        if delta.content:
            yield from self._text_events("message", delta.content, logprobs if self._with_logprobs else [])
        for call in delta.tool_calls:
            yield from self._call_events(call)
        if choice.finish_reason is not None:
            self._finish_reason = choice.finish_reason
            yield from self._close("incomplete" if choice.finish_reason == "length" else "completed")

    def _text_events(
        self, kind: Literal["reasoning", "message"], text: str, logprobs: list[Any]
    ) -> Iterator[ResponseEvent]:
        if self._open is None or self._open.type != kind:
            yield from self._open_item(kind)
        item = self._open
        assert item is not None
        place = {"item_id": item.id, "output_index": self._index, "content_index": 0}
        if not item.content:
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item.content = [part]
            yield self._event("response.content_part.added", **place, part=dict(part))
        item.content[0]["text"] += text
        if kind == "message":
            item.content[0]["logprobs"] += logprobs
            yield self._event("response.output_text.delta", **place, delta=text, logprobs=logprobs)
        else:
            yield self._event("response.reasoning_text.delta", **place, delta=text)

    def _call_events(self, call: protocol.ToolCallDelta) -> Iterator[ResponseEvent]:
        if call.index != self._call:
            self._call = call.index
            name, call_id = call.function.name or "", call.id or ""
            yield from self._open_item("function_call", call_id=call_id, name=name, arguments="")
        item = self._open
        assert item is not None
        if call.function.arguments:
            item.arguments += call.function.arguments
            place = {"item_id": item.id, "output_index": self._index}
            yield self._event("response.function_call_arguments.delta", **place, delta=call.function.arguments)

    def _open_item(
        self, kind: Literal["reasoning", "message", "function_call"], **fields: Any
    ) -> Iterator[ResponseEvent]:
        yield from self._close("completed")
        if kind != "function_call":
            fields["content"] = []
        if kind == "message":
            fields["role"] = "assistant"
        if kind == "reasoning":
            fields["summary"] = []
        item_id = f"{PREFIXES[kind]}_{secrets.token_hex(12)}"
        item = OutputItem(id=item_id, type=kind, status="in_progress", **fields)
        self._open = item
        self.response.output.append(item)
        added = item.model_copy(deep=True)
        yield self._event("response.output_item.added", output_index=self._index, item=added)

    def _close(self, status: Literal["completed", "incomplete"]) -> Iterator[ResponseEvent]:
        """The events at the end of the open item."""
        item, self._open = self._open, None
        if item is None:
            return
        item.status = status
        place = {"item_id": item.id, "output_index": self._index}
        if item.type == "function_call":
            call = {"arguments": item.arguments, "name": item.name}
            yield self._event("response.function_call_arguments.done", **place, **call)
        for part in item.content:
            kind = "output_text" if item.type == "message" else "reasoning_text"
            logprobs = {"logprobs": part["logprobs"]} if item.type == "message" else {}
            yield self._event(f"response.{kind}.done", **place, content_index=0, text=part["text"], **logprobs)
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
        done_item = item.model_copy(deep=True)
        yield self._event("response.output_item.done", output_index=self._index, item=done_item)

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        self._sequence_number += 1
        return ResponseEvent(type=kind, sequence_number=self._sequence_number, **fields)

    def _snapshot(self) -> ResponseObject:
        return self.response.model_copy(deep=True)

    def _set_status(self) -> None:
        self.response.status = "completed"
        if self._finish_reason == "length":
            self.response.status = "incomplete"
            self.response.incomplete_details = {"reason": "max_output_tokens"}

    def _usage(self, usage: protocol.TokenUsage) -> ResponseUsage:
        thoughts = [part["text"] for item in self.response.output if item.type == "reasoning" for part in item.content]
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details={
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "cache_write_tokens": 0,
            },
            output_tokens=usage.completion_tokens,
            output_tokens_details={"reasoning_tokens": sum(map(self._count_tokens, thoughts))},
            total_tokens=usage.total_tokens,
        )


def _response(body: ResponsesBody, model: str, sampling: SamplingParams) -> ResponseObject:
    """The response before its first item."""
    choice = body.tool_choice
    text = {"format": {"type": "text"}}
    if body.text is not None:
        text |= body.text.model_dump(by_alias=True, exclude_none=True)
    return ResponseObject(
        id=f"resp_{secrets.token_hex(12)}",
        object="response",
        created_at=int(time.time()),
        status="in_progress",
        background=False,
        error=None,
        incomplete_details=None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata,
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=None,
        reasoning={"effort": body.reasoning and body.reasoning.effort, "summary": None},
        service_tier="default",
        store=False,
        temperature=sampling.temperature,
        text=text,
        tool_choice=choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto",
        tools=[tool.model_dump() | {"strict": tool.strict is True} for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
        truncation="disabled",
        usage=None,
    )
