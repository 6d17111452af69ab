"""What DeepSeek's models write, V3, R1 and V3.1: `<think>` reasoning `</think>` answer, and tool calls.

The prompt may already end inside the reasoning (R1's template ends with `<think>`). White space around its delimiters
belongs to neither part. A text that never closes its reasoning has no answer.

An answer may end with a section of calls, each of them (V3, R1: the first form; V3.1: the second)

    <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME ⏎ ```json ⏎ ARGUMENTS ⏎ ```<｜tool▁call▁end｜>
    <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>

between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>. A call is emitted once it is complete; what only resembles a
call stays text, so nothing is lost. Arguments are passed on as the model wrote them, valid JSON or not.
"""

import re
from typing import Literal

from soli.chat.parser import MessageDelta, ToolCall

OPEN, CLOSE = "<think>", "</think>"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCED = re.compile(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*", re.DOTALL)


class DeepSeekParser:
    """Reasoning, and tool calls if the request has tools."""

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


def ends_in_reasoning(prompt: str) -> bool:
    """Whether the answer to this rendered prompt starts inside the reasoning."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningSplitter:
    """Splits a streamed text into reasoning and answer, independently of how the text is cut into chunks.

    `starts_inside`: the prompt ended with `<think>`, so the first token is reasoning already.
    """

    def __init__(self, starts_inside: bool) -> None:
        self._state: Literal["start", "reasoning", "answer"] = "reasoning" if starts_inside else "start"
        self._buffer = ""
        self._strip_leading = True  # until this part has emitted text

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        """The reasoning and the answer that this chunk completes; either may be "". `last`: no chunk follows."""
        self._buffer += text
        if self._state == "start":
            self._detect_open(last)
        reasoning = self._push_reasoning(last) if self._state == "reasoning" else ""
        answer = self._emit(len(self._buffer)) if self._state == "answer" else ""
        return reasoning, answer

    def _detect_open(self, last: bool) -> None:
        start = self._buffer.lstrip()
        if start.startswith(OPEN):
            self._buffer = start[len(OPEN) :]
            self._state = "reasoning"
        elif last or not OPEN.startswith(start):
            self._state = "answer"
            self._strip_leading = False  # an answer without reasoning keeps its white space

    def _push_reasoning(self, last: bool) -> str:
        reasoning, delimiter, answer = self._buffer.partition(CLOSE)
        if not delimiter:
            length = len(reasoning) if last else safe_length(reasoning, CLOSE)
            return self._emit(len(reasoning[:length].rstrip()))
        emitted = self._emit(len(reasoning.rstrip()))
        self._buffer = answer
        self._state = "answer"
        self._strip_leading = True
        return emitted

    def _emit(self, length: int) -> str:
        """Takes `length` characters off the buffer, without the white space that starts a part."""
        emitted = self._buffer[:length]
        self._buffer = self._buffer[length:]
        if self._strip_leading:
            emitted = emitted.lstrip()
        self._strip_leading = self._strip_leading and not emitted
        return emitted


class ToolCallSplitter:
    """Splits a streamed text into plain text and tool calls, independently of how it is cut into chunks."""

    def __init__(self) -> None:
        self._buffer = ""
        self._in_section = False
        self._section_start = ""  # CALLS_BEGIN until the section has a call: text again if it never has one

    def push(self, text: str, last: bool = False) -> list[str | ToolCall]:
        """The plain text and the calls that this chunk completes. `last`: no chunk follows, and what did not become a
        call is text."""
        self._buffer += text
        parts: list[str | ToolCall] = []
        while self._parse_section(parts) if self._in_section else self._parse_text(parts):
            pass
        if last:
            rest = self._section_start + self._buffer
            parts.append(rest if rest.strip() else "")
        return [part for part in parts if part != ""]

    def _parse_text(self, parts: list[str | ToolCall]) -> bool:
        """Parses up to where a section starts; False when more text is needed."""
        start = self._buffer.find(CALLS_BEGIN)
        if start < 0:
            length = safe_length(self._buffer, CALLS_BEGIN)
            parts.append(self._buffer[:length])
            self._buffer = self._buffer[length:]
            return False
        parts.append(self._buffer[:start])
        self._buffer = self._buffer[start + len(CALLS_BEGIN) :]
        self._in_section = True
        self._section_start = CALLS_BEGIN
        return True

    def _parse_section(self, parts: list[str | ToolCall]) -> bool:
        """Parses one call, or the section's end; False when more text is needed."""
        section = self._buffer.lstrip()
        if section.startswith(CALL_BEGIN):
            text, end, rest = section.partition(CALL_END)
            if not end:
                return False
            parts.append(parse_call(text[len(CALL_BEGIN) :]) or self._section_start + text + end)
            self._buffer = rest
            self._section_start = ""
            return True
        if section.startswith(CALLS_END):
            self._leave_section(section[len(CALLS_END) :])
            return True
        if CALL_BEGIN.startswith(section) or CALLS_END.startswith(section):
            return False
        parts.append(self._section_start + self._buffer[:1])  # no section after all
        self._leave_section(self._buffer[1:])
        return True

    def _leave_section(self, rest: str) -> None:
        self._buffer = rest
        self._in_section = False
        self._section_start = ""


def parse_call(text: str) -> ToolCall | None:
    """The call between its delimiters; None when `text` is not one."""
    head, separator, rest = text.partition(SEPARATOR)
    if not separator:
        return None
    fenced = _FENCED.fullmatch(rest) if head.strip() == "function" else None
    if fenced:
        return ToolCall(fenced[1], fenced[2])
    return ToolCall(head.strip(), rest.strip()) if head.strip() else None


def safe_length(text: str, *delimiters: str) -> int:
    """How many leading characters of `text`, which contains no complete delimiter, cannot belong to one: the end of a
    chunk that may be the start of a delimiter waits for the next chunk."""
    longest = min(len(text), max(map(len, delimiters)) - 1)
    starts = (n for n in range(longest, 0, -1) if any(delimiter.startswith(text[-n:]) for delimiter in delimiters))
    return len(text) - next(starts, 0)
