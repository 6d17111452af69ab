"""Tool calls as DeepSeek's models write them, and the schemas that force a call.

A text may end with a section of calls, each of them (V3, R1: the first form; V3.1: the second)

    <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME ⏎ ```json ⏎ ARGUMENTS ⏎ ```<｜tool▁call▁end｜>
    <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>

between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>. A call is emitted once it is complete; what only resembles a
call stays text, so nothing is lost. Arguments are passed on as the model wrote them, valid JSON or not.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soli.chat.delimiters import safe_length

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCED = re.compile(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A call to the tool `name`; `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


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


def parse_forced_call(text: str, name: str | None) -> ToolCall | None:
    """The call that a constraint forced: the arguments of `name`, or with None what `any_call_schema` describes. None
    when the text was cut before its end."""
    try:
        value = json.loads(text)
        if name is not None:
            return ToolCall(name, text.strip())
        return ToolCall(value["name"], json.dumps(value["arguments"], ensure_ascii=False))
    except (ValueError, KeyError, TypeError):
        return None


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
