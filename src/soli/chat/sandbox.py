"""The process that renders chat templates: untrusted code, in jinja2's sandbox and within limits of time and memory.

`python -m soli.chat.sandbox` reads frames from standard input and answers each on standard output; a frame is a length
of eight bytes, big-endian, and that much JSON. The first frame has the templates with the names of their special tokens
and the ids of the added tokens, each later one a prompt to render (soli/chat/workers.py is the other side). It imports
no torch. Whatever exceeds its CPU time is ended by the kernel; memory that cannot be had is a MemoryError.

What a person wrote stays text: an added token (`<|user|>`, `</think>`, a delimiter of tool calls) spelled out in a
message is broken by a marker before the template sees it, so that only the template's own become tokens. Assistant
messages keep their reasoning delimiters, which templates use to leave earlier reasoning out.
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
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from soli.chat.parser import CLOSE, OPEN, ends_in_reasoning
from soli.chat.template_values import ContentParts, JsonText, NullContent, use_values
from soli.chat.tool_prompts import tool_prompt

CPU_SECONDS = 2  # for one frame; a legitimate prompt takes milliseconds
BASE_MEMORY = 256 * 2**20  # bytes of address space, interpreter included
MEMORY_PER_BYTE = 32  # more for each byte of a frame: its text up to four bytes a character, in a few copies
NICENESS = 10  # the tokens of other answers come first
NO_REASONING = f"\n{CLOSE}\n\n"  # as DeepSeek-V3.1 writes it for an answer without reasoning
SHORT_PROMPT = 2048  # tokens; where a prompt may have fewer, the text about tools is brief
LENGTH_BYTES = 8


class Generation(Extension):
    """`{% generation %}`, with which a template marks for training what an assistant says: its content, unchanged."""

    tags = {"generation"}  # noqa: RUF012 (an instance's in jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox:
    """Compiled templates by name, one of them "default". `names`: the special tokens by the names that templates use
    (bos_token). `added_tokens`: ids by name. `family`: whose form of calls a template without `tools` is told."""

    def __init__(
        self, sources: Mapping[str, str], names: Mapping[str, str], added_tokens: Mapping[str, int], family: str
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        use_values(environment)
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        }
        self._variables = {
            name: meta.find_undeclared_variables(environment.parse(source)) for name, source in sources.items()
        }
        self.supports_tools = {name: "tools" in variables for name, variables in self._variables.items()}
        self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        self._family = family
        self._names = dict(names)
        # White space alone delimits nothing, and templates write it as ordinary text.
        self._added_tokens = {token: index for token, index in added_tokens.items() if not token.isspace()}
        longest_first = sorted(self._added_tokens, key=len, reverse=True)
        self._added_token = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        allow_reasoning: bool,
        template: str | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        max_tokens: int | None = None,
    ) -> tuple[list[str | int], bool]:
        """The prompt as texts and token ids, and whether it ends inside the reasoning. `max_tokens`: of any prompt."""
        name = template or ("tool_use" if tools and "tool_use" in self._templates else "default")
        if name not in self._templates:
            names = ", ".join(sorted(self._templates))
            raise RejectedOption("chat_template", f"there is no chat template {name!r}, only {names}: name one of them")
        if documents and "documents" not in self._variables[name]:
            raise RejectedOption("documents", "the chat template has no use for documents: leave them out")
        marker = f"\ue000{secrets.token_hex(8)}\ue001"
        reserved = {
            **self._names,
            "tools": self._mark(tools, marker) if self.supports_tools[name] else None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        if clash := sorted((reserved.keys() | {"messages"}) & variables.keys()):
            raise RejectedOption(
                "variables", f"the chat template's variable {clash[0]} is set by the server: leave it out"
            )
        context = self._mark({"documents": documents, **variables}, marker) | reserved
        turns = [self._message(message, marker) for message in messages]
        end = f"\ue000{secrets.token_hex(8)}\ue001 " if continue_final_message else ""
        if end:
            turns[-1] = _extended(turns[-1], end)
        tool_text = ""
        if tools and not self.supports_tools[name]:
            is_brief = max_tokens is not None and max_tokens < SHORT_PROMPT
            tool_text = tool_prompt(self._family, self._mark(tools, marker), is_brief)
        text = _rendered_text(self._templates[name], context, turns, tool_text)
        if end:
            text = _cut(text, end)
            return self._split(text, marker), text.rfind(OPEN) > text.rfind(CLOSE)
        if not allow_reasoning and ends_in_reasoning(text):
            text = text.rstrip() + NO_REASONING
        return self._split(text, marker), ends_in_reasoning(text)

    def _message(self, message: Mapping[str, Any], marker: str) -> dict[str, Any]:
        """A message as templates read it, its added tokens marked."""
        marked = self._mark(message, marker, (OPEN, CLOSE) if message.get("role") == "assistant" else ())
        content, calls = marked.get("content"), marked.get("tool_calls")
        if not content:
            marked["content"] = NullContent() if calls else ""
        elif isinstance(content, list):
            marked["content"] = ContentParts(content)
        for call, original in zip(calls or [], message.get("tool_calls") or [], strict=True):
            arguments = call.get("function", {}).get("arguments")
            if isinstance(arguments, str):
                value = self._mark(_parsed(original["function"]["arguments"]), marker)
                call["function"]["arguments"] = JsonText(arguments, value)
        if reasoning := marked.get("reasoning_content"):
            marked.setdefault("thinking", reasoning)  # the name of it in other families' templates
            marked.setdefault("reasoning", reasoning)
        return marked

    def _mark(self, value: Any, marker: str, exempt: Sequence[str] = ()) -> Any:
        """`value` with the marker behind the first character of every added token in its strings, except `exempt`."""
        if isinstance(value, str):
            return self._added_token.sub(
                lambda match: match[0] if match[0] in exempt else match[0][0] + marker + match[0][1:], value
            )
        if isinstance(value, Mapping):
            return {self._mark(key, marker): self._mark(item, marker, exempt) for key, item in value.items()}
        if isinstance(value, list):
            return [self._mark(item, marker, exempt) for item in value]
        return value

    def _split(self, text: str, marker: str) -> list[str | int]:
        parts: list[str | int] = []
        end = 0
        for match in self._added_token.finditer(text):
            parts += filter(None, [text[end : match.start()].replace(marker, "")])
            parts.append(self._added_tokens[match[0]])
            end = match.end()
        return [*parts, *filter(None, [text[end:].replace(marker, "")])]


def _rendered_text(
    template: jinja2.Template, context: Mapping[str, Any], messages: list[dict[str, Any]], tool_text: str
) -> str:
    """The template's text. `tool_text`: about tools, which goes into the system message, or into the first user message
    where the template leaves that out or rejects it. A template that rejects content parts gets their text."""
    candidates = [messages]
    if any(isinstance(message["content"], ContentParts) for message in messages):
        joined = [{**message, "content": _joined(message["content"])} for message in messages]
        candidates.append(joined)
    if tool_text:
        candidates = [place(turns, tool_text) for turns in candidates for place in (_in_system, _in_user)]
    failure: Exception = jinja2.TemplateError("it has no place to tell the model about tools")
    for turns in candidates:
        try:
            text = template.render({**context, "messages": turns})
        except MemoryError:
            raise
        except Exception as error:  # a template may fail in any way that Python knows
            failure = error
        else:
            if tool_text.strip() in text:
                return text
    raise failure


def _in_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """`messages` with a text at the end of the first system message, or in one of its own."""
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    content = _joined(messages[0]["content"])
    return [{**messages[0], "content": f"{content}\n\n{text}" if content else text}, *messages[1:]]


def _in_user(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """`messages` with a text before the first user message's own."""
    for index, message in enumerate(messages):
        if message["role"] == "user":
            changed = {**message, "content": f"{text}\n\n{_joined(message['content'])}"}
            return [*messages[:index], changed, *messages[index + 1 :]]
    return [{"role": "user", "content": text}, *messages]


def _joined(content: str) -> str:
    """Content as text: of parts their text."""
    return str.__str__(content) if isinstance(content, ContentParts) else content


def _extended(message: dict[str, Any], text: str) -> dict[str, Any]:
    """The final message with `text` behind its own."""
    if not isinstance(message["content"], str) or not _joined(message["content"]):
        raise jinja2.TemplateError("the last message has no text to continue")
    return {**message, "content": _joined(message["content"]) + text}


def _cut(text: str, end: str) -> str:
    """A rendered text up to `end`, which is behind the last message's; without the white space before where the
    template removed that of the message."""
    start = text.rfind(end.strip())
    if start < 0:
        raise jinja2.TemplateError("the text of the last message is not at its end: it cannot be continued")
    return text[:start] if text.startswith(end, start) else text[:start].rstrip()


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return None


class RejectedOption(Exception):
    """What a request asks of a template that this one does not have. `field`: the argument of `render` to blame."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


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
        except RejectedOption as error:
            data = json.dumps({"failure": error.field, "reason": str(error)}).encode()
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
    parts, starts_in_reasoning = sandbox.render(**prompt, max_tokens=max_tokens)
    tokens = fewest_tokens(parts, longest_token)
    if max_tokens is not None and tokens > max_tokens:
        return {"fewest_tokens": tokens}
    return {"parts": parts, "starts_in_reasoning": starts_in_reasoning}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    main()
