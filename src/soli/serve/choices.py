"""One answer's events as pieces of OpenAI's formats: deltas of a stream, and the same summed up for a whole answer."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from soli.chat.reasoning import ThinkSplit
from soli.chat.tool_calls import ToolCall, ToolText, forced_call
from soli.engine.logprobs import TokenLogprob
from soli.engine.request import Event
from soli.engine.text_model import TextModel
from soli.serve.prompts import Asked


class Choice(Protocol):
    """Answer number `index` in one of the formats."""

    def push(self, event: Event) -> dict[str, Any] | None:
        """The piece of a stream that an event makes; None for one that says nothing."""

    def whole(self) -> dict[str, Any]:
        """Everything pushed so far, as it stands in an answer that is not streamed."""


@dataclass
class CompletionChoice:
    """Of /v1/completions."""

    index: int
    text_model: TextModel
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[tuple[TokenLogprob, int]] = field(default_factory=list)

    def push(self, event: Event) -> dict[str, Any] | None:
        new = [(event.logprob, len(self.text))] if event.logprob is not None else []
        self.text += event.text
        self.logprobs += new
        self.finish_reason = event.finish_reason
        if not (event.text or new or event.finish_reason):
            return None
        return self._piece(event.text, new)

    def whole(self) -> dict[str, Any]:
        return self._piece(self.text, self.logprobs)

    def _piece(self, text: str, logprobs: Sequence[tuple[TokenLogprob, int]]) -> dict[str, Any]:
        said = self._logprobs(logprobs) if logprobs else None
        return {"index": self.index, "text": text, "logprobs": said, "finish_reason": self.finish_reason}

    def _logprobs(self, logprobs: Sequence[tuple[TokenLogprob, int]]) -> dict[str, Any]:
        def show(token: int) -> str:
            return token_name(self.text_model, token)

        return {
            "tokens": [show(one.token) for one, _ in logprobs],
            "token_logprobs": [one.logprob for one, _ in logprobs],
            "top_logprobs": [{show(token): value for token, value in one.top} for one, _ in logprobs],
            "text_offset": [at for _, at in logprobs],
        }


class ChatChoice:
    """Of /v1/chat/completions: reasoning and calls apart from the answer's text."""

    def __init__(self, index: int, text_model: TextModel, asked: Asked) -> None:
        self._index, self._text_model, self._forced = index, text_model, asked.forced_tool
        self._think = None if asked.requests[0].constraint else ThinkSplit(asked.thinking)
        self._tools = ToolText() if asked.tools else None
        self._begun = False
        self._content = self._reasoning = self._forced_text = ""
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None

    def push(self, event: Event) -> dict[str, Any] | None:
        last = event.finish_reason is not None
        delta = self._delta(event.text, last)
        logprobs = [] if event.logprob is None else [self._logprob(event.logprob)]
        self._logprobs += logprobs
        if last:
            called = event.finish_reason == "stop" and self._calls
            self._finish_reason = "tool_calls" if called else event.finish_reason
        if not (delta or logprobs or last):
            return None
        if not self._begun:
            self._begun, delta = True, {"role": "assistant", "content": ""} | delta
        said = {"content": logprobs} if logprobs else None
        return {"index": self._index, "delta": delta, "logprobs": said, "finish_reason": self._finish_reason}

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content or (None if self._calls else "")}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self._calls:
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in self._calls]
        said = {"content": self._logprobs} if self._logprobs else None
        return {"index": self._index, "message": message, "logprobs": said, "finish_reason": self._finish_reason}

    def _delta(self, text: str, last: bool) -> dict[str, Any]:
        if self._forced is not None:
            return self._forced_delta(text, last)
        thought, said = self._think.push(text, last) if self._think else ("", text)
        parts = self._tools.push(said, last) if self._tools else [said]
        content = "".join(part for part in parts if isinstance(part, str))
        calls = [self._call(part) for part in parts if isinstance(part, ToolCall)]
        self._reasoning += thought
        self._content += content
        delta = {"reasoning_content": thought, "content": content, "tool_calls": calls}
        return {name: value for name, value in delta.items() if value}

    def _forced_delta(self, text: str, last: bool) -> dict[str, Any]:
        """A forced call is given out when it is whole; cut short, its text is what there is."""
        self._forced_text += text
        if not last:
            return {}
        call = forced_call(self._forced_text, self._forced or None)
        if call is None:
            self._content = self._forced_text
            return {"content": self._content}
        return {"tool_calls": [self._call(call)]}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self._calls.append(
            {
                "index": len(self._calls),
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
        )
        return self._calls[-1]

    def _logprob(self, found: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in found.top]
        return self._token(found.token, found.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        written = self._text_model.tokenizer.token_bytes(token)
        return {"token": token_name(self._text_model, token), "logprob": logprob, "bytes": list(written)}


def token_name(text_model: TextModel, token: int) -> str:
    """A token in logprobs: its text; bytes that are no whole character as OpenAI writes them, `bytes:\\xe4\\xb8`."""
    written = text_model.tokenizer.token_bytes(token)
    try:
        return written.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)
