"""From generated text to the parts of a chat message: reasoning, content, tool calls.

A parser serves one answer: the text is pushed chunk by chunk, and the parts do not depend on how it was cut. `<think>`
reasoning `</think>` is common to the families; how calls are written is the family's CallFormat (soli/chat/parsers).

The opening of a call is held until the name behind it is known. If the request has such a tool, the call begins: its
arguments are passed on as they are generated, valid JSON or not, and reasoning that was not closed before ends there.
Else all of it stays text. An answer that is cut inside a call has the arguments up to there.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

OPEN, CLOSE = "<think>", "</think>"
ANY_CALL_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"arguments"\s*:\s*(?=\S)')  # of `any_call_schema`


@dataclass(frozen=True)
class CallDelta:
    """What is new of the call `index` of a message. With `name` it begins; `arguments` continue its JSON, as the model
    wrote it. `call_id` is None where the family writes none."""

    index: int
    arguments: str = ""
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True)
class MessageDelta:
    """What one chunk of text adds to a message; the parts are often all empty."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[CallDelta, ...] = ()


class OutputParser(Protocol):
    """Parses one answer."""

    def push(self, text: str, last: bool = False) -> MessageDelta:
        """The parts that this chunk completes. `last`: no chunk follows."""


@dataclass(frozen=True)
class CallHead:
    """The beginning of a call, `length` characters up to its arguments. `opens_section`: more calls may follow until
    the section's end."""

    name: str
    length: int
    call_id: str | None = None


class ArgumentsDecoder(Protocol):
    """The arguments of one call, from the family's form to JSON."""

    def push(self, text: str, last: bool) -> tuple[str, str | None]:
        """JSON that this text completes, and the text behind the call's end; None as long as the call goes on."""


class CallFormat(Protocol):
    """How a family writes calls. `openings`: what a call, or a section of calls, begins with; `section_ends`: what may
    follow the last call of a section."""

    @property
    def openings(self) -> tuple[str, ...]: ...

    @property
    def section_ends(self) -> tuple[str, ...]: ...

    @property
    def begins_with_space(self) -> bool:
        """Whether white space before a call is part of the form, not of the content."""

    def head(self, text: str, last: bool) -> CallHead | Literal["incomplete"] | None:
        """The call at the beginning of `text`, which starts with an opening; None if there is none."""

    def arguments(self, head: CallHead) -> ArgumentsDecoder: ...


class PlainParser:
    """All text is content: for answers constrained to a format, in which no delimiter is one."""

    def push(self, text: str, last: bool = False) -> MessageDelta:
        return MessageDelta(content=text)


class _Part:
    """The reasoning or the content. White space that begins a part is held until text follows, and so is, with
    `hold_trailing`, white space behind text: it belongs to nothing where the part ends there."""

    def __init__(self, strip_leading: bool, hold_trailing: bool) -> None:
        self.strip_leading = strip_leading
        self._hold_trailing = hold_trailing
        self._spaces = ""  # held
        self._has_text = False
        self.emitted = ""  # since `take`

    def push(self, text: str) -> None:
        text = self._spaces + text
        if not self._has_text and self.strip_leading:
            text = text.lstrip()
        end = len(text.rstrip()) if self._hold_trailing or not self._has_text else len(text)
        if end and not self._hold_trailing:
            end = len(text)
        self._has_text = self._has_text or end > 0
        self._spaces = text[end:]
        self.emitted += text[:end]

    def restart(self, strip_leading: bool) -> None:
        """What follows is separate from what was before, as behind a call."""
        self._spaces = ""
        self._has_text = False
        self.strip_leading = strip_leading

    def finish(self, is_whole: bool) -> None:
        """The answer ends; `is_whole`: there was nothing beside this part, which may be white space alone."""
        if self._has_text or (is_whole and not self.strip_leading):
            self.emitted += self._spaces
        self._spaces = ""

    def take(self) -> str:
        emitted, self.emitted = self.emitted, ""
        return emitted


class MessageParser:
    """Reasoning, content and, where `calls` says how they are written, tool calls.

    `starts_in_reasoning`: the prompt ended with `<think>`, so the first token is reasoning already. A text that never
    closes its reasoning has no content. `split_reasoning` False: all is content and calls.
    """

    def __init__(
        self, calls: CallFormat | None = None, starts_in_reasoning: bool = False, split_reasoning: bool = True
    ) -> None:
        self._calls = calls
        self._state: Literal["start", "reasoning", "content"] = "start" if split_reasoning else "content"
        if starts_in_reasoning and split_reasoning:
            self._state = "reasoning"
        self._buffer = ""
        self._reasoning = _Part(strip_leading=True, hold_trailing=True)
        self._content = _Part(strip_leading=False, hold_trailing=calls is not None and calls.begins_with_space)
        self._arguments: ArgumentsDecoder | None = None  # of the call that goes on
        self._in_section = False  # behind a call, where another one or the section's end may follow
        self._unclosed = False  # a call ended the reasoning, whose end may still be written
        self._call_count = 0
        self._call_ids: set[str | None] = set()
        self._deltas: list[CallDelta] = []

    def push(self, text: str, last: bool = False) -> MessageDelta:
        self._buffer += text
        while self._step(last):
            pass
        if last:
            self._finish()
        delta = MessageDelta(self._reasoning.take(), self._content.take(), _merged(self._deltas))
        self._deltas = []
        return delta

    def _step(self, last: bool) -> bool:
        """Parses one piece of the buffer; False when more text is needed."""
        if self._arguments is not None:
            return self._push_arguments(last)
        if self._in_section:
            return self._push_section(last)
        if self._state == "start":
            return self._detect_open(last)
        return self._push_text(last)

    def _detect_open(self, last: bool) -> bool:
        start = self._buffer.lstrip()
        if start.startswith(OPEN):
            self._buffer = start[len(OPEN) :]
            self._state = "reasoning"
            return True
        if last or not OPEN.startswith(start):
            self._state = "content"
            return True
        return False

    def _push_text(self, last: bool) -> bool:
        """Text up to the next delimiter."""
        delimiters = list(self._calls.openings) if self._calls else []
        if self._state == "reasoning" or self._unclosed:
            delimiters.append(CLOSE)
        start, delimiter = first_delimiter(self._buffer, delimiters)
        self._emit(start if delimiter or last else safe_length(self._buffer, *delimiters))
        if not delimiter:
            return False
        if delimiter == CLOSE:
            self._buffer = self._buffer[len(CLOSE) :]
            self._state = "content"
            self._unclosed = False
            self._content.restart(strip_leading=True)
            return True
        return self._push_head(delimiter, last)

    def _push_head(self, opening: str, last: bool) -> bool:
        """The call that an opening at the beginning of the buffer may start."""
        assert self._calls is not None
        head = self._calls.head(self._buffer, last)
        if head == "incomplete":
            return False
        if head is None:
            self._emit(len(opening))
            return True
        if self._state == "reasoning":
            self._state = "content"
            self._unclosed = True
        call_id = None if head.call_id in self._call_ids else head.call_id  # a model may repeat itself
        self._call_ids.add(head.call_id)
        self._deltas.append(CallDelta(self._call_count, "", head.name, call_id))
        self._call_count += 1
        self._arguments = self._calls.arguments(head)
        self._buffer = self._buffer[head.length :]
        return True

    def _push_arguments(self, last: bool) -> bool:
        assert self._arguments is not None
        text, self._buffer = self._buffer, ""
        arguments, rest = self._arguments.push(text, last)
        if arguments:
            self._deltas.append(CallDelta(self._call_count - 1, arguments))
        if rest is None:
            return False
        self._buffer = rest
        self._arguments = None
        self._in_section = True
        return True

    def _push_section(self, last: bool) -> bool:
        """The section's end, or another call."""
        assert self._calls is not None
        text = self._buffer.lstrip()
        delimiters = (*self._calls.openings, *self._calls.section_ends)
        start, delimiter = first_delimiter(text, delimiters)
        if (start or not delimiter) and not last and any(delimiter.startswith(text) for delimiter in delimiters):
            return False
        if delimiter and start == 0:
            self._buffer = text.removeprefix(delimiter) if delimiter in self._calls.section_ends else text
        self._in_section = False
        self._content.restart(strip_leading=False)
        return True

    def _emit(self, length: int) -> None:
        """Takes `length` characters of text off the buffer."""
        text = self._buffer[:length]
        self._buffer = self._buffer[length:]
        (self._reasoning if self._state == "reasoning" else self._content).push(text)

    def _finish(self) -> None:
        """What did not become a call is text; white space behind a call is nothing."""
        if self._buffer and self._arguments is None:
            self._emit(len(self._buffer))
        self._content.finish(is_whole=self._call_count == 0)


class ForcedCallParser:
    """A text constrained to one call of `tool` (None: of any tool, as `any_call_schema` describes it). The arguments
    are passed on as they come; a text that was cut before the name is content."""

    def __init__(self, tool: str | None) -> None:
        self._tool = tool
        self._buffer = ""
        self._started = False
        self._arguments = ""  # so far

    def push(self, text: str, last: bool = False) -> MessageDelta:
        self._buffer += text
        name = None
        if not self._started and (name := self._read_name()) is not None:
            self._started = True
        if not self._started:
            return MessageDelta(content=self._buffer if last else "")
        arguments = self._read_arguments(last)
        if name is None and not arguments:
            return MessageDelta()
        return MessageDelta(tool_calls=(CallDelta(0, arguments, name),))

    def _read_name(self) -> str | None:
        """The name, once the arguments begin; what is before them is removed."""
        self._buffer = self._buffer.lstrip()
        if self._tool is not None:
            return self._tool if self._buffer else None
        match = ANY_CALL_HEAD.match(self._buffer)
        if match is None:
            return None
        self._buffer = self._buffer[match.end() :]
        return match[1]

    def _read_arguments(self, last: bool) -> str:
        """Arguments but for what may be the text's end: white space and, where the call is an object, its brace."""
        end = len(self._buffer.rstrip())
        if self._tool is None and self._buffer[:end].endswith("}"):
            end = len(self._buffer[: end - 1].rstrip())
        arguments = self._buffer[:end]
        self._buffer = self._buffer[end:]
        self._arguments += arguments
        if last and self._buffer.strip() and not is_json(self._arguments):  # the brace is that of the arguments
            return arguments + self._buffer.rstrip()
        return arguments


def any_call_schema(tools: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The JSON schema of one call to any of the tools (name, schema of its arguments): {"name", "arguments"}."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{number}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, (name, _) in enumerate(tools)
    ]
    definitions = {str(number): _rebase(schema, f"#/$defs/{number}") for number, (_, schema) in enumerate(tools)}
    return {"anyOf": calls, "$defs": definitions}


def _rebase(schema: Any, root: str) -> Any:
    """`schema` stored at `root`: references to its own root point there instead."""
    if isinstance(schema, list):
        return [_rebase(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    rebased = {key: _rebase(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        rebased["$ref"] = root + reference[1:]
    return rebased


def ends_in_reasoning(prompt: str) -> bool:
    """Whether the answer to this rendered prompt starts inside the reasoning."""
    return prompt.rstrip().endswith(OPEN)


def first_delimiter(text: str, delimiters: Sequence[str]) -> tuple[int, str]:
    """Where the first of the delimiters in `text` starts, and the longest that starts there; "" if there is none."""
    matches = [(start, -len(delimiter), delimiter) for delimiter in delimiters if (start := text.find(delimiter)) >= 0]
    return (min(matches)[0], min(matches)[2]) if matches else (len(text), "")


def safe_length(text: str, *delimiters: str) -> int:
    """How many leading characters of `text`, which contains no complete delimiter, cannot belong to one: the end of a
    chunk that may be the start of a delimiter waits for the next chunk."""
    longest = min(len(text), max(map(len, delimiters), default=1) - 1)
    starts = (n for n in range(longest, 0, -1) if any(delimiter.startswith(text[-n:]) for delimiter in delimiters))
    return len(text) - next(starts, 0)


def _merged(deltas: Sequence[CallDelta]) -> tuple[CallDelta, ...]:
    """The deltas of one chunk, one for each call."""
    merged: list[CallDelta] = []
    for delta in deltas:
        if merged and merged[-1].index == delta.index:
            merged[-1] = replace(merged[-1], arguments=merged[-1].arguments + delta.arguments)
        else:
            merged.append(delta)
    return tuple(merged)


def is_json(text: str) -> bool:
    """Whether a text that the model wrote is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
