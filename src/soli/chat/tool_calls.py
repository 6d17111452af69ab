"""Tool calls as DeepSeek's models write them, and the schemas that force a call.

A text may end with a section of calls, each of them (V3, R1: the first form; V3.1: the second)

    <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME ⏎ ```json ⏎ ARGUMENTS ⏎ ```<｜tool▁call▁end｜>
    <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>

between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>. A call is given out when it is whole; what looks like one but
is not stays text, so nothing is lost. Arguments are handed on as the model wrote them, valid JSON or not.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soli.chat.delimiters import settled

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCED = re.compile(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """What the model wants called; `arguments` is JSON as it wrote it."""

    name: str
    arguments: str


class ToolText:
    """Splits a text that comes in pieces into plain text and calls; the result does not depend on how it was cut."""

    def __init__(self) -> None:
        self._held = ""
        self._section = ""  # the mark that opened the section we are in, as long as it held no call; or " " after one

    def push(self, text: str, last: bool = False) -> list[str | ToolCall]:
        """The plain text and the whole calls that this piece completes. `last`: no other comes, and what never became a
        call is text."""
        self._held += text
        found: list[str | ToolCall] = []
        while self._in_section(found) if self._section else self._outside(found):
            pass
        if last:
            rest = self._section.lstrip() + self._held
            found.append(rest if rest.strip() else "")
        return [part for part in found if part != ""]

    def _outside(self, found: list[str | ToolCall]) -> bool:
        begin = self._held.find(CALLS_BEGIN)
        if begin < 0:
            cut = settled(self._held, CALLS_BEGIN)
            found.append(self._held[:cut])
            self._held = self._held[cut:]
            return False
        found.append(self._held[:begin])
        self._held, self._section = self._held[begin + len(CALLS_BEGIN) :], CALLS_BEGIN
        return True

    def _in_section(self, found: list[str | ToolCall]) -> bool:
        inside = self._held.lstrip()
        if inside.startswith(CALL_BEGIN):
            call, ended, rest = inside.partition(CALL_END)
            if not ended:
                return False
            found.append(parse_call(call[len(CALL_BEGIN) :]) or self._section.lstrip() + call + ended)
            self._held, self._section = rest, " "
            return True
        if inside.startswith(CALLS_END):
            self._held, self._section = inside[len(CALLS_END) :], ""
            return True
        if CALL_BEGIN.startswith(inside) or CALLS_END.startswith(inside):
            return False
        found.append(self._section.lstrip() + self._held[:1])  # no section after all
        self._held, self._section = self._held[1:], ""
        return True


def parse_call(text: str) -> ToolCall | None:
    """The call between its marks; None when it is not one."""
    head, separator, rest = text.partition(SEPARATOR)
    if not separator:
        return None
    fenced = _FENCED.fullmatch(rest) if head.strip() == "function" else None
    if fenced:
        return ToolCall(fenced[1], fenced[2])
    return ToolCall(head.strip(), rest.strip()) if head.strip() else None


def schema_of_any(tools: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
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
    return {"anyOf": calls, "$defs": {str(at): _moved(schema, f"#/$defs/{at}") for at, (_, schema) in enumerate(tools)}}


def forced_call(text: str, name: str | None) -> ToolCall | None:
    """The call that a constraint forced: the arguments of `name`, or with None what `schema_of_any` describes. None
    when the text was cut before its end."""
    try:
        value = json.loads(text)
        if name is not None:
            return ToolCall(name, text.strip())
        return ToolCall(value["name"], json.dumps(value["arguments"], ensure_ascii=False))
    except (ValueError, KeyError, TypeError):
        return None


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to its own root point to `root` instead, where it has been moved."""
    if isinstance(schema, list):
        return [_moved(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved
