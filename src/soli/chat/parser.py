"""From generated text to the parts of a chat message: reasoning, content, tool calls.

A model family writes these parts in its own format and gets its own `OutputParser` (deepseek.py). A parser serves one
answer: the text is pushed chunk by chunk, and the parts do not depend on how it was cut. An answer that a constraint
forces has a format of its own, which is here with its schema.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class ToolCall:
    """A call to the tool `name`; `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


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


def parse_forced_call(text: str, name: str | None) -> ToolCall | None:
    """The call that a constraint forced: the arguments of `name`, or with None what `any_call_schema` describes. None
    when the text was cut before its end."""
    try:
        value = json.loads(text)
        if name is not None:
            return ToolCall(name, text.strip())
        return ToolCall(value["name"], json.dumps(value["arguments"], ensure_ascii=False))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


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
