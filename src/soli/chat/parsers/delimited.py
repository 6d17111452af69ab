"""Calls between delimiters, with JSON arguments: DeepSeek's V3, R1 and V3.1, and Kimi-K2.

A section of calls is SECTION_BEGIN CALL_BEGIN call CALL_END ... SECTION_END; a call without a section is one as well.
Models of these families are seen to write the arguments in a Markdown fence, or none at all, which means {}.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

from soli.chat.parser import ArgumentsDecoder, CallHead, first_delimiter, safe_length

MAX_HEAD = 256  # characters of a call before its arguments; more are text
FENCE = "```"
_FENCE_START = re.compile(r"```[A-Za-z]*\s*")
_NAME = re.compile(r"[A-Za-z0-9_.:-]*")


@dataclass(frozen=True)
class Delimiters:
    """Of sections, calls, and what separates a call's head from its arguments."""

    section_begin: str
    section_end: str
    call_begin: str
    separator: str
    call_end: str


@dataclass(frozen=True)
class DelimitedFormat(ABC):
    """Calls of one family; the classes below read what is between CALL_BEGIN and the arguments."""

    delimiters: Delimiters
    tools: Collection[str]
    begins_with_space: ClassVar[bool] = False

    @property
    def openings(self) -> tuple[str, ...]:
        return (self.delimiters.section_begin, self.delimiters.call_begin)

    @property
    def section_ends(self) -> tuple[str, ...]:
        return (self.delimiters.section_end,)

    def head(self, text: str, last: bool) -> CallHead | Literal["incomplete"] | None:
        start = 0
        if text.startswith(self.delimiters.section_begin):
            start = len(self.delimiters.section_begin)
            start += len(text[start:]) - len(text[start:].lstrip())
        call = text[start : start + MAX_HEAD]
        begin = self.delimiters.call_begin
        if not call.startswith(begin):
            return "incomplete" if begin.startswith(call) and not last else None
        end, delimiter = first_delimiter(call, (self.delimiters.separator, self.delimiters.call_end))
        if not delimiter:
            return "incomplete" if len(call) < MAX_HEAD and not last else None
        if delimiter != self.delimiters.separator:
            return None
        arguments = end + len(delimiter)
        head = self._read(call[len(begin) : end].strip(), call[arguments:], len(call) < MAX_HEAD and not last)
        if isinstance(head, CallHead):
            return CallHead(head.name, start + arguments + head.length, head.call_id)
        return head

    def arguments(self, head: CallHead) -> ArgumentsDecoder:
        return JsonArguments((self.delimiters.call_end, self.delimiters.section_end, self.delimiters.call_begin))

    @abstractmethod
    def _read(self, head: str, rest: str, incomplete: bool) -> CallHead | Literal["incomplete"] | None:
        """The call of this head; `rest` is behind the separator, of which `length` characters belong to the head.
        `incomplete`: more of it may come."""


class DeepSeekFormat(DelimitedFormat):
    """V3.1: NAME separator ARGUMENTS. V3 and R1: "function" separator NAME line break ARGUMENTS."""

    def _read(self, head: str, rest: str, incomplete: bool) -> CallHead | Literal["incomplete"] | None:
        if head in self.tools and head != "function":
            return CallHead(head, 0)
        if head == "function":
            start = len(rest) - len(rest.lstrip())
            match = _NAME.match(rest, start)
            assert match is not None
            if match.end() == len(rest) and incomplete:
                return "incomplete"
            if match[0] in self.tools and match.end() < len(rest):
                return CallHead(match[0], match.end())
        return CallHead(head, 0) if head in self.tools else None


class KimiFormat(DelimitedFormat):
    """ID separator ARGUMENTS, where the id is functions.NAME:NUMBER."""

    def _read(self, head: str, rest: str, incomplete: bool) -> CallHead | Literal["incomplete"] | None:
        name = re.sub(r":\d+$", "", head)
        for candidate in (name, name.removeprefix("functions.")):
            if candidate in self.tools:
                return CallHead(candidate, 0, head)
        return None


class JsonArguments:
    """Arguments up to one of `ends`, without white space and a fence around them. An end of CALL_BEGIN or SECTION_END,
    where CALL_END is missing, is not part of the call."""

    def __init__(self, ends: tuple[str, ...]) -> None:
        self._ends = ends
        self._buffer = ""
        self._leading = True  # until the arguments' first character
        self._fenced = False
        self._is_empty = True

    def push(self, text: str, last: bool) -> tuple[str, str | None]:
        self._buffer += text
        end, delimiter = first_delimiter(self._buffer, self._ends)
        if not delimiter:
            return self._emit(len(self._buffer) if last else safe_length(self._buffer, *self._ends), last), None
        rest = self._buffer[end:]
        self._buffer = self._buffer[:end]
        arguments = self._emit(end, True)
        return arguments or ("{}" if self._is_empty else ""), rest.removeprefix(self._ends[0])

    def _emit(self, length: int, closed: bool) -> str:
        """What of the first `length` characters belongs to the arguments; `closed`: nothing of them follows."""
        text, delimiter_start = self._buffer[:length], self._buffer[length:]
        if self._leading:
            text = self._skip_leading(text, closed)
        if self._leading:
            self._buffer = text + delimiter_start
            return ""
        end = len(text.rstrip())
        if self._fenced:
            ticks = len(text[:end]) - len(text[:end].rstrip("`"))
            if ticks and (ticks >= len(FENCE) or not closed):
                end = len(text[: end - min(ticks, len(FENCE))].rstrip())
        self._buffer = "" if closed else text[end:] + delimiter_start
        self._is_empty = self._is_empty and not text[:end]
        return text[:end]

    def _skip_leading(self, text: str, closed: bool) -> str:
        """`text` without white space and fence before the arguments."""
        text = text.lstrip()
        fence = _FENCE_START.match(text)
        if not closed and (FENCE.startswith(text) or (fence and fence.end() == len(text))):
            return text  # the fence may go on
        self._leading = False
        self._fenced = fence is not None
        return text[fence.end() :] if fence else text
