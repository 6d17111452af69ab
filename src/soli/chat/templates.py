"""Chat templates of a model folder: messages to tokens.

The template (tokenizer_config.json or chat_template.jinja) is untrusted code. It runs in processes of its own, within
limits of time and memory (workers.py, sandbox.py), also when one terminal chats with one model. Tokenizing is done
here, of prompts that are not certain to be too long.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from soli.chat.workers import RenderFailure, RenderWorkers
from soli.data.tokenizer import TextTooLong, Tokenizer, special_names
from soli.errors import SoliError
from soli.input_files import read_object_if_present, read_text
from soli.sections import is_text, shown


class RenderedPrompt(NamedTuple):
    """A prompt up to where the assistant's message starts; `starts_in_reasoning`: it starts inside `<think>`."""

    token_ids: list[int]
    starts_in_reasoning: bool


class RejectedMessages(SoliError):
    """Messages without a prompt. `field`: the argument of `render` to blame."""

    def __init__(self, message: str, field: str = "messages") -> None:
        super().__init__(message)
        self.field = field


class ChatTemplate:
    """`source` is jinja2, `names` the special tokens by the names that templates use (bos_token). SoliError for a
    template that does not compile; `render` raises it for messages that the template does not accept, and for all
    messages when compiling exceeds the limits."""

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._workers = RenderWorkers(
            {"source": source, "names": dict(names), "added_tokens": tokenizer.added_tokens()}
        )
        self._failure: RenderFailure | None = None  # of compiling
        self.supports_tools = False
        try:
            self.supports_tools = self._workers.start()["supports_tools"]
        except RenderFailure as error:
            if error.kind == "template":
                raise SoliError(f"the chat template does not compile ({error}): fetch the folder again") from error
            self._failure = error

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer) -> Self | None:
        """The folder's template; None if it has none."""
        path = folder / "tokenizer_config.json"
        config = read_object_if_present(path)
        file = folder / "chat_template.jinja"
        source = read_text(file) if os.path.lexists(file) else config.get("chat_template")
        if isinstance(source, list) and all(isinstance(entry, dict) for entry in source):  # several by name
            source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
        if source is None:
            return None
        if not is_text(source):
            raise SoliError(
                f"{path}: chat_template is {shown(source)}; it must be text, or a list of objects with name and "
                "template"
            )
        return cls(source, tokenizer, special_names(path))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        allow_reasoning: bool = True,
        max_tokens: int | None = None,
    ) -> RenderedPrompt:
        """The prompt. `variables`: further variables of the template. `allow_reasoning` False: reasoning that the
        template opens is closed at once. TextTooLong for a prompt that is certain to have more than `max_tokens`,
        before it is tokenized; RejectedMessages for what the template does not accept."""
        prompt = {
            "messages": messages,
            "tools": tools,
            "variables": variables or {},
            "allow_reasoning": allow_reasoning,
        }
        longest = self._tokenizer.longest_token
        try:
            if self._failure is not None:
                raise self._failure
            reply = self._workers.render({"prompt": prompt, "max_tokens": max_tokens, "longest_token": longest})
        except RenderFailure as error:
            raise _rejection(error) from error
        if max_tokens is not None and "fewest_tokens" in reply:
            raise TextTooLong("the prompt", reply["fewest_tokens"], max_tokens)
        parts: list[str | int] = reply["parts"]
        texts = iter(self._tokenizer.encode_batch([part for part in parts if isinstance(part, str)]))
        token_ids = [token for part in parts for token in (next(texts) if isinstance(part, str) else [part])]
        return RenderedPrompt(token_ids, reply["starts_in_reasoning"])

    def check_length(self, text_bytes: int, most: int) -> None:
        """TextTooLong for messages whose texts, so many bytes together, have more than `most` tokens for certain."""
        self._tokenizer.check_length("the conversation", text_bytes, most)

    def close(self) -> None:
        """Ends the processes; a prompt that is rendered is rejected."""
        self._workers.close()


def _rejection(error: RenderFailure) -> RejectedMessages:
    if error.kind == "variable":
        return RejectedMessages(str(error), "variables")
    if error.kind == "closed":
        return RejectedMessages("the chat template's process was ended: the server is shutting down")
    if error.kind == "limit":
        return RejectedMessages(f"the model's chat template {error} for these messages: shorten them, or see its card")
    return RejectedMessages(f"the model's chat template does not accept these messages ({error}): see its card")
