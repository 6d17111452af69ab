"""From generated text to the parts of a chat message: reasoning, content, tool calls.

A model family writes these parts in its own format and gets its own `OutputParser`; DeepSeek's is here. A parser serves
one answer: the text is pushed chunk by chunk, and the parts do not depend on how it was cut.
"""

from dataclasses import dataclass
from typing import Protocol

from soli.chat.reasoning import ReasoningSplitter
from soli.chat.tool_calls import ToolCall, ToolCallSplitter, parse_forced_call


@dataclass(frozen=True)
class MessageDelta:
    """What one chunk of text adds to a message; the parts are often all empty."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class OutputParser(Protocol):
    """Parses one answer."""

    def push(self, text: str, last: bool = False) -> MessageDelta:
        """The parts that this chunk completes. `last`: no chunk follows."""


class DeepSeekParser:
    """V3, R1 and V3.1: `<think>` reasoning, and tool calls if the request has tools."""

    def __init__(self, starts_in_reasoning: bool, parse_tool_calls: bool) -> None:
        self._reasoning = ReasoningSplitter(starts_in_reasoning)
        self._tool_calls = ToolCallSplitter() if parse_tool_calls else None

    def push(self, text: str, last: bool = False) -> MessageDelta:
        reasoning, answer = self._reasoning.push(text, last)
        if self._tool_calls is None:
            return MessageDelta(reasoning, answer)
        parts = self._tool_calls.push(answer, last)
        content = "".join(part for part in parts if isinstance(part, str))
        return MessageDelta(reasoning, content, tuple(part for part in parts if isinstance(part, ToolCall)))


class PlainParser:
    """All text is content: for answers constrained to a format, in which no delimiter is one."""

    def push(self, text: str, last: bool = False) -> MessageDelta:
        return MessageDelta(content=text)


class ForcedCallParser:
    """A text constrained to one call of `tool` (None: of any tool). The call is emitted when the text ends; a text that
    was cut short is content."""

    def __init__(self, tool: str | None) -> None:
        self._tool = tool
        self._text = ""

    def push(self, text: str, last: bool = False) -> MessageDelta:
        self._text += text
        if not last:
            return MessageDelta()
        call = parse_forced_call(self._text, self._tool)
        return MessageDelta(content=self._text) if call is None else MessageDelta(tool_calls=(call,))
