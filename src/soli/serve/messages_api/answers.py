"""Answers of the Messages API from the chunks of a chat: events, and the message that they make up.

Blocks come in the order in which the model wrote them: thinking, text, calls. A whole message is what its own events
make, so that a streamed message cannot differ from it.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import from_json

from soli.serve import protocol_responses as protocol
from soli.serve.errors import ANTHROPIC_PATH, ApiError

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
STOP_REASONS: dict[str, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
DELTA_FIELDS = {"text": "text", "thinking": "thinking", "input_json": "partial_json"}


class AnswerBlock(BaseModel):
    """`type` text has `text`; thinking has `thinking` and an empty `signature`; tool_use has `id`, `name`, `input`."""

    type: Literal["text", "thinking", "tool_use"]
    text: str = ""
    thinking: str = ""
    signature: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}


class AnthropicUsage(BaseModel):
    """`input_tokens` are those that were computed; others of the prompt are read from the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicAnswer(BaseModel):
    """The answer of POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class AnthropicEvent(BaseModel):
    """An event of a stream: message_start has `message`, blocks have `index`, their deltas and the end `delta`."""

    type: str
    message: AnthropicAnswer | None = None
    index: int = 0
    content_block: AnswerBlock | None = None
    delta: dict[str, Any] = {}
    usage: AnthropicUsage | None = None
    error: protocol.AnthropicErrorDetail | None = None


class TokenCount(BaseModel):
    """The answer of POST /v1/messages/count_tokens."""

    input_tokens: int


def error_event(error: ApiError) -> AnthropicEvent:
    """The last event of a stream that failed."""
    return AnthropicEvent.model_validate(error.body(ANTHROPIC_PATH))


class MessageBuilder:
    """Turns the chunks of one chat into events, and keeps the message that they make up."""

    def __init__(self, message_id: str, model: str, prompt_tokens: int) -> None:
        self.message = AnthropicAnswer(
            id=message_id,
            type="message",
            role="assistant",
            model=model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=_usage(prompt_tokens, 0, 0),
        )
        self._call = -1  # index of the call whose block is open
        self._arguments = ""
        self._is_open = False

    async def events(
        self, chunks: AsyncGenerator[protocol.GenerationChunk, None]
    ) -> AsyncGenerator[AnthropicEvent, None]:
        """The events of a stream."""
        async with aclosing(chunks):
            yield AnthropicEvent(type="message_start", message=self.message.model_copy(deep=True))
            async for chunk in chunks:
                if chunk.usage is not None:
                    self._set_usage(chunk.usage)
                for choice in chunk.choices:
                    for event in self._choice_events(choice):
                        yield event
            for event in self._close():
                yield event
            delta = {"stop_reason": self.message.stop_reason, "stop_sequence": self.message.stop_sequence}
            yield AnthropicEvent(type="message_delta", delta=delta, usage=self.message.usage)
            yield AnthropicEvent(type="message_stop")

    async def whole(self, chunks: AsyncGenerator[protocol.GenerationChunk, None]) -> AnthropicAnswer:
        """The message, whole."""
        async for _ in self.events(chunks):
            pass
        if not self.message.content:  # clients read the first block
            self.message.content.append(AnswerBlock(type="text", text=""))
        return self.message

    def _choice_events(self, choice: protocol.ChatChunkChoice) -> list[AnthropicEvent]:
        delta = choice.delta
        events = self._text_events("thinking", delta.reasoning_content) if delta.reasoning_content else []
        events += self._text_events("text", delta.content) if delta.content else []
        for call in delta.tool_calls:
            events += self._call_events(call)
        if choice.finish_reason is not None:
            self.message.stop_sequence = choice.stop_reason
            reason = STOP_REASONS.get(choice.finish_reason)  # none of an answer that failed, which an error follows
            self.message.stop_reason = "stop_sequence" if choice.stop_reason is not None else reason
        return events

    def _text_events(self, kind: Literal["text", "thinking"], text: str) -> list[AnthropicEvent]:
        events = []
        if not self._is_open or self.message.content[-1].type != kind:
            empty = AnswerBlock(type="text", text="")
            if kind == "thinking":
                empty = AnswerBlock(type="thinking", thinking="", signature="")
            events = self._open(empty)
        block = self.message.content[-1]
        setattr(block, kind, getattr(block, kind) + text)
        return [*events, self._delta(kind, text)]

    def _call_events(self, call: protocol.ToolCallDelta) -> list[AnthropicEvent]:
        events = []
        if call.index != self._call:
            block = AnswerBlock(type="tool_use", id=call.id or "", name=call.function.name or "", input={})
            events = self._open(block)
            self._call = call.index
        if call.function.arguments:
            self._arguments += call.function.arguments
            events.append(self._delta("input_json", call.function.arguments))
        return events

    def _open(self, block: AnswerBlock) -> list[AnthropicEvent]:
        events = self._close()
        self._is_open = True
        self.message.content.append(block)
        start = AnthropicEvent(type="content_block_start", index=self._index, content_block=block.model_copy(deep=True))
        return [*events, start]

    def _close(self) -> list[AnthropicEvent]:
        if not self._is_open:
            return []
        self._is_open = False
        block = self.message.content[-1]
        if block.type == "tool_use":
            block.input = _arguments(self._arguments)
            self._arguments = ""
        return [AnthropicEvent(type="content_block_stop", index=self._index)]

    def _delta(self, kind: str, text: str) -> AnthropicEvent:
        delta = {"type": f"{kind}_delta", DELTA_FIELDS[kind]: text}
        return AnthropicEvent(type="content_block_delta", index=self._index, delta=delta)

    @property
    def _index(self) -> int:
        return len(self.message.content) - 1

    def _set_usage(self, usage: protocol.TokenUsage) -> None:
        cached = usage.prompt_tokens_details.cached_tokens
        self.message.usage = _usage(usage.prompt_tokens, cached, usage.completion_tokens)


def _usage(prompt: int, cached: int, completion: int) -> AnthropicUsage:
    return AnthropicUsage(
        input_tokens=prompt - cached,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=cached,
        output_tokens=completion,
    )


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments, as far as they are complete in one that was cut short; {} for what is no object."""
    try:
        value = from_json(text or "{}", allow_partial=True)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}
