"""The process that renders chat templates: untrusted code, in jinja2's sandbox and within limits of time and memory.

`python -m soli.chat.sandbox` reads frames from standard input and answers each on standard output; a frame is a length
of eight bytes, big-endian, and that much JSON. The first frame is the template with the names of its special tokens
and the ids of the added tokens, each later one a prompt to render (soli/chat/workers.py is the other side). It imports
no torch. Whatever exceeds its CPU time is ended by the kernel; memory that cannot be had is a MemoryError.

What a person wrote stays text: an added token (`<|user|>`, `</think>`, a delimiter of tool calls) spelled out in a
message is broken by a marker before the template sees it and encoded in two parts, so that only the template's own
become tokens. Assistant messages keep their reasoning delimiters, which templates use to leave earlier reasoning out.
"""

import json
import math
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import IO, Any

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from soli.chat.deepseek import CLOSE, OPEN, ends_in_reasoning

CPU_SECONDS = 2  # for one frame; a legitimate prompt takes milliseconds
BASE_MEMORY = 256 * 2**20  # bytes of address space, interpreter included
MEMORY_PER_BYTE = 32  # more for each byte of a frame: its text up to four bytes a character, in a few copies
NICENESS = 10  # the tokens of other answers come first
NO_REASONING = f"\n{CLOSE}\n\n"  # as DeepSeek-V3.1 writes it for an answer without reasoning
LENGTH_BYTES = 8


class JsonText(str):
    """JSON as the model wrote it, which `tojson` leaves unchanged: templates insert arguments with or without it."""


class Sandbox:
    """A compiled template. `names`: the special tokens by the names that templates use (bos_token). `added_tokens`:
    ids by name."""

    def __init__(self, source: str, names: Mapping[str, str], added_tokens: Mapping[str, int]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        }
        self.supports_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        self._template = environment.from_string(source)
        self._names = dict(names)
        self._added_tokens = dict(added_tokens)
        longest_first = sorted(self._added_tokens, key=len, reverse=True)
        self._added_token = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        allow_reasoning: bool,
    ) -> tuple[list[str | int], bool]:
        """The prompt as texts and token ids, and whether it ends inside the reasoning."""
        marker = f"\ue000{secrets.token_hex(8)}\ue001"
        reserved = {
            **self._names,
            "messages": [self._mark_message(message, marker) for message in messages],
            "tools": self._mark(tools, marker),
            "add_generation_prompt": True,
        }
        if clash := sorted(reserved.keys() & variables.keys()):
            raise ReservedVariable(f"the chat template's variable {clash[0]} is set by the server: leave it out")
        text = self._template.render(self._mark(variables, marker) | reserved)
        if not allow_reasoning and ends_in_reasoning(text):
            text = text.rstrip() + NO_REASONING
        return self._split(text, marker), ends_in_reasoning(text)

    def _mark_message(self, message: Mapping[str, Any], marker: str) -> Any:
        marked = self._mark(message, marker, (OPEN, CLOSE) if message.get("role") == "assistant" else ())
        for call in marked.get("tool_calls") or []:
            function = call.get("function", {})
            if isinstance(function.get("arguments"), str):
                function["arguments"] = JsonText(function["arguments"])
        return marked

    def _mark(self, value: Any, marker: str, exempt: Sequence[str] = ()) -> Any:
        """`value` with the marker behind the first character of every added token in its strings, except `exempt`."""
        if isinstance(value, str):
            return self._added_token.sub(
                lambda match: match[0] if match[0] in exempt else match[0][0] + marker + match[0][1:], value
            )
        if isinstance(value, Mapping):
            return {key: self._mark(item, marker, exempt) for key, item in value.items()}
        if isinstance(value, list):
            return [self._mark(item, marker, exempt) for item in value]
        return value

    def _split(self, text: str, marker: str) -> list[str | int]:
        parts: list[str | int] = []
        end = 0
        for match in self._added_token.finditer(text):
            parts += filter(None, text[end : match.start()].split(marker))
            parts.append(self._added_tokens[match[0]])
            end = match.end()
        return [*parts, *filter(None, text[end:].split(marker))]


class ReservedVariable(Exception):
    """A request sets a variable that the server sets."""


def fewest_tokens(parts: Sequence[str | int], longest_token: int | None) -> int:
    """At least so many tokens have the parts of a prompt. `longest_token`: in bytes, None if that is not known."""
    texts = [part.encode() for part in parts if isinstance(part, str)]
    if longest_token is None:
        return len(parts)
    return len(parts) - len(texts) + sum(-(-len(text) // longest_token) for text in texts)


def read_frame(stream: IO[bytes], limit: int | None = None) -> bytes | None:
    """The next frame; None at the end of the stream, or for a frame of more than `limit` bytes."""
    head = stream.read(LENGTH_BYTES)
    length = int.from_bytes(head, "big")
    if len(head) < LENGTH_BYTES or (limit is not None and length > limit):
        return None
    frame = stream.read(length)
    return frame if len(frame) == length else None


def write_frame(stream: IO[bytes], frame: bytes) -> None:
    stream.write(len(frame).to_bytes(LENGTH_BYTES, "big"))
    stream.write(frame)
    stream.flush()


def main() -> None:
    """Answers frames until standard input ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    with suppress(OSError):
        os.nice(NICENESS)
    sandbox: Sandbox | None = None
    while (frame := read_frame(requests)) is not None:
        limit_resources(len(frame))
        try:
            if sandbox is None:
                sandbox = Sandbox(**json.loads(frame))
                reply: dict[str, Any] = {"supports_tools": sandbox.supports_tools}
            else:
                reply = _rendered(sandbox, **json.loads(frame))
            data = json.dumps(reply, ensure_ascii=False).encode()
        except MemoryError:
            data = b'{"failure": "memory"}'
        except ReservedVariable as error:
            data = json.dumps({"failure": "variable", "reason": str(error)}).encode()
        except Exception as error:  # a template may fail in any way that Python knows
            data = json.dumps({"failure": "template", "reason": " ".join(str(error).split())[:300]}).encode()
        write_frame(replies, data)


def limit_resources(frame_bytes: int) -> None:
    """Bounds what is computed for a frame, where the system can: macOS does not bound address space."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    seconds = math.ceil(time.process_time()) + CPU_SECONDS
    for kind, soft in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, BASE_MEMORY + MEMORY_PER_BYTE * frame_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _rendered(
    sandbox: Sandbox, prompt: Mapping[str, Any], max_tokens: int | None, longest_token: int | None
) -> dict[str, Any]:
    parts, starts_in_reasoning = sandbox.render(**prompt)
    tokens = fewest_tokens(parts, longest_token)
    if max_tokens is not None and tokens > max_tokens:
        return {"fewest_tokens": tokens}
    return {"parts": parts, "starts_in_reasoning": starts_in_reasoning}


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter that `transformers` gives to templates: no HTML escapes, characters as they are."""
    if isinstance(value, JsonText):
        return value
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    main()
