"""Calls whose arguments are pairs of a key and a value between delimiters: DeepSeek-V3.2 (DSML) and GLM-4.5 to 4.7.

DSML, in which the first delimiter's token is written D here:

    <D function_calls> <D invoke name="NAME"> <D parameter name="KEY" string="true">VALUE</D parameter> </D invoke>
    </D function_calls>

with string="false" for a value that is JSON; models are seen to leave D out. GLM, with line breaks or without:

    <tool_call>NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value> </tool_call>

where a value is text if the tool's schema says that it is a string, else JSON. Arguments become a JSON object, text
values piece by piece.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from soli.chat.parser import ArgumentsDecoder, CallHead, first_delimiter, is_json, safe_length
from soli.chat.parsers.delimited import MAX_HEAD, JsonArguments

DSML = "｜DSML｜"
_NAME = re.compile(r"\s*([A-Za-z0-9_.-]*)")

Schemas = Mapping[str, Mapping[str, Any]]  # of the tools' arguments, by name


@dataclass(frozen=True)
class PairForm:
    """How one family writes pairs. `key`: a regular expression from a pair's beginning to its value, with the groups
    key and perhaps is_string; `key_start` begins it, `value_ends` and `call_ends` end a value and a call."""

    key_start: tuple[str, ...]
    key: re.Pattern[str]
    value_ends: tuple[str, ...]
    call_ends: tuple[str, ...]


DSML_FORM = PairForm(
    (f"<{DSML}parameter", "<parameter"),
    re.compile(rf'<(?:{DSML})?parameter\s+name="(?P<key>[^"<>]*)"(?:\s+string="(?P<is_string>true|false)")?\s*>'),
    (f"</{DSML}parameter>", "</parameter>"),
    (f"</{DSML}invoke>", "</invoke>"),
)
GLM_FORM = PairForm(
    ("<arg_key>",),
    re.compile(r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>"),
    ("</arg_value>",),
    ("</tool_call>",),
)


class DsmlFormat:
    """Calls of DeepSeek-V3.2."""

    section_begins = tuple(f"<{mark}{name}>" for mark in (DSML, "") for name in ("function_calls", "tool_calls"))
    call_begins = tuple(f"<{mark}invoke" for mark in (DSML, ""))
    section_ends = tuple(begin.replace("<", "</") for begin in section_begins)
    begins_with_space = True
    _head = re.compile(rf'<(?:{DSML})?invoke\s+name="([^"]*)"\s*>')

    def __init__(self, tools: Schemas) -> None:
        self._tools = tools
        self.openings = (*self.section_begins, *self.call_begins)

    def head(self, text: str, last: bool) -> CallHead | Literal["incomplete"] | None:
        start, begin = first_delimiter(text, self.section_begins)
        start = len(begin) if begin and start == 0 else 0
        start += len(text[start:]) - len(text[start:].lstrip())
        call = text[start : start + MAX_HEAD]
        if not call.startswith(self.call_begins):
            may_begin = any(begin.startswith(call) for begin in self.call_begins)
            return "incomplete" if may_begin and not last else None
        if ">" not in call:
            return "incomplete" if len(call) < MAX_HEAD and not last else None
        match = self._head.match(call)
        return CallHead(match[1], start + match.end()) if match and match[1] in self._tools else None

    def arguments(self, head: CallHead) -> ArgumentsDecoder:
        return PairArguments(DSML_FORM, self._tools[head.name])


class GlmFormat:
    """Calls of GLM-4.5 to 4.7."""

    openings = ("<tool_call>",)
    begins_with_space = True
    section_ends: tuple[str, ...] = ()

    def __init__(self, tools: Schemas) -> None:
        self._tools = tools

    def head(self, text: str, last: bool) -> CallHead | Literal["incomplete"] | None:
        begin = len(self.openings[0])
        match = _NAME.match(text[: begin + MAX_HEAD], begin)
        assert match is not None
        if match.end() == len(text):
            return "incomplete" if not last else None
        return CallHead(match[1], match.end()) if match[1] in self._tools else None

    def arguments(self, head: CallHead) -> ArgumentsDecoder:
        return PairArguments(GLM_FORM, self._tools[head.name])


class PairArguments:
    """The JSON object that pairs make. Arguments that are JSON already stay as they are."""

    def __init__(self, form: PairForm, schema: Mapping[str, Any]) -> None:
        self._form = form
        self._properties: Mapping[str, Any] = schema.get("properties") or {}
        self._buffer = ""
        self._has_pairs = False  # known from the first character
        self._count = 0  # of pairs so far
        self._value: Literal["text", "JSON"] | None = None  # of the pair that is not complete
        self._json: JsonArguments | None = None

    def push(self, text: str, last: bool) -> tuple[str, str | None]:
        if self._json is not None:
            return self._json.push(text, last)
        self._buffer += text
        emitted: list[str] = []
        complete: bool | str
        while True:
            if self._value is not None:
                piece, complete = self._push_value(last)
                emitted.append(piece)
            else:
                complete = self._push_key(emitted)
            if self._json is not None:
                text, self._buffer = self._buffer, ""
                return self._json.push(text, last)
            if isinstance(complete, str):
                return "".join([*emitted, "}" if self._count else "{}"]), complete
            if not complete:
                return "".join(emitted), None

    def _push_key(self, emitted: list[str]) -> bool | str:
        """The next pair up to its value, or the text behind the call; False when more text is needed."""
        text = self._buffer.lstrip()
        if not self._has_pairs and text:
            self._has_pairs = text.startswith("<")
            if not self._has_pairs:
                self._json = JsonArguments(self._form.call_ends)
                return True
        start, delimiter = first_delimiter(text, (*self._form.key_start, *self._form.call_ends))
        if not delimiter:
            self._buffer = text[safe_length(text, *self._form.key_start, *self._form.call_ends) :]
            return False
        if delimiter in self._form.call_ends:
            return text[start + len(delimiter) :]
        self._buffer = text[start:]
        match = self._form.key.match(self._buffer)
        if match is None:  # the key is not complete, or never will be
            end, delimiter = first_delimiter(self._buffer, self._form.call_ends)
            return self._buffer[end + len(delimiter) :] if delimiter else False
        self._buffer = self._buffer[match.end() :]
        groups = match.groupdict()
        self._value = self._kind(groups["key"].strip(), groups.get("is_string"))
        emitted.append(f"{', ' if self._count else '{'}{json.dumps(groups['key'].strip(), ensure_ascii=False)}: ")
        emitted.append('"' if self._value == "text" else "")
        self._count += 1
        return True

    def _kind(self, key: str, is_string: str | None) -> Literal["text", "JSON"]:
        """How a value is read: as DSML says, else as the schema does."""
        if is_string is not None:
            return "text" if is_string == "true" else "JSON"
        schema = self._properties.get(key)
        return "text" if isinstance(schema, Mapping) and schema.get("type") == "string" else "JSON"

    def _push_value(self, last: bool) -> tuple[str, bool]:
        """JSON that the buffer has of the value, and whether it is complete. Text is passed on as it comes; what should
        be JSON and is not, is text."""
        ends = (*self._form.value_ends, *self._form.call_ends)
        end, delimiter = first_delimiter(self._buffer, ends)
        if self._value == "text":
            length = end if delimiter or last else safe_length(self._buffer, *ends)
            piece = json.dumps(self._buffer[:length], ensure_ascii=False)[1:-1]
        else:
            length = end if delimiter else len(self._buffer) if last else 0
            piece = self._buffer[:length].strip()
            if delimiter and not is_json(piece):
                piece = json.dumps(self._buffer[:length], ensure_ascii=False)
        self._buffer = self._buffer[length:]
        if not delimiter:
            return piece, False
        if delimiter in self._form.value_ends:
            self._buffer = self._buffer[len(delimiter) :]
        piece += '"' if self._value == "text" else ""
        self._value = None
        return piece, True
