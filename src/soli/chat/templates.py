"""Chat templates of a model folder: messages to tokens.

A template (chat_template.jinja, tokenizer_config.json, additional_chat_templates/NAME.jinja) is untrusted code. It runs
in processes of its own, within limits of time and memory (workers.py, sandbox.py), also when one terminal chats with
one model. Tokenizing is done here, of prompts that are not certain to be too long. As in transformers, "default"
renders messages, and "tool_use", where there is one, messages with tools.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypedDict, Unpack

from soli.chat import deepseek_v32_template
from soli.chat.parsers.call_grammar import strict_calls
from soli.chat.parsers.families import REASONING, Family, detect_family, family_by_name
from soli.chat.workers import RenderFailure, RenderWorkers
from soli.data.tokenizer import TextTooLong, Tokenizer, special_names
from soli.engine.constraint import ConstraintSpec
from soli.errors import SoliError
from soli.input_files import read_object_if_present, read_text
from soli.sections import is_text, shown


class RenderedPrompt(NamedTuple):
    """A prompt up to where the assistant's message starts; `starts_in_reasoning`: it starts inside `<think>`."""

    token_ids: list[int]
    starts_in_reasoning: bool


class RenderOptions(TypedDict, total=False):
    """`template`: which one by name. `documents`: for templates that read them. `add_generation_prompt` False: the
    prompt ends with the last message. `continue_final_message`: it ends inside the last message, which goes on."""

    template: str | None
    documents: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool
    continue_final_message: bool


class RejectedMessages(SoliError):
    """Messages without a prompt. `field`: the argument of `render` to blame."""

    def __init__(self, message: str, field: str = "messages") -> None:
        super().__init__(message)
        self.field = field


class ChatTemplate:
    """`source` is jinja2, or several by name, `names` the special tokens by the names that templates use (bos_token),
    `family` whose calls the model writes, by default as `detect_family` says. SoliError for a template that does not
    compile; `render` raises it for messages that the template does not accept, and for all messages when compiling
    exceeds the limits."""

    def __init__(
        self,
        source: str | Mapping[str, str],
        tokenizer: Tokenizer,
        names: Mapping[str, str],
        family: Family | None = None,
    ) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source)
        added_tokens = tokenizer.added_tokens()
        self.family = family or detect_family(sources.values(), added_tokens, None)
        self._tokenizer = tokenizer
        self._workers = RenderWorkers(
            {"sources": sources, "names": dict(names), "added_tokens": added_tokens, "family": self.family.name}
        )
        self._failure: RenderFailure | None = None  # of compiling
        self.supports_tools = False
        try:
            self.supports_tools = any(self._workers.start()["supports_tools"].values())
        except RenderFailure as error:
            if error.kind == "template":
                raise SoliError(f"the chat template does not compile ({error}): fetch the folder again") from error
            self._failure = error

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer: Tokenizer, file: Path | None = None, tool_parser: str | None = None
    ) -> Self | None:
        """The folder's templates, or the one in `file`; None if there is none. `tool_parser`: the family by name."""
        sources = {"default": read_text(file)} if file is not None else _folder_sources(folder)
        model_type = read_object_if_present(folder / "config.json").get("model_type")
        family = detect_family(sources.values(), tokenizer.added_tokens(), model_type)
        if not sources and family.name == "deepseek_v32":
            sources = {"default": deepseek_v32_template.TEMPLATE}
        if not sources:
            return None
        if tool_parser is not None:
            family = family_by_name(tool_parser)
        return cls(sources, tokenizer, special_names(folder / "tokenizer_config.json"), family)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        allow_reasoning: bool = True,
        max_tokens: int | None = None,
        **options: Unpack[RenderOptions],
    ) -> RenderedPrompt:
        """The prompt. `variables`: further variables of the template. `allow_reasoning` False: reasoning that the
        template opens is closed at once. TextTooLong for a prompt that is certain to have more than `max_tokens`,
        before it is tokenized; RejectedMessages for what the template does not accept."""
        prompt = {
            "messages": messages,
            "tools": tools,
            "variables": variables or {},
            "allow_reasoning": allow_reasoning,
            **options,
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

    def parsed_ids(self, has_tools: bool) -> frozenset[int]:
        """Tokens that an answer's parser reads: in the text, even where the tokenizer says that they are special."""
        return frozenset(self._parsed_tokens(has_tools).values())

    def _parsed_tokens(self, has_tools: bool) -> dict[str, int]:
        """The same by name, those with more of a delimiter first: a vocabulary may have whole tags as tokens."""
        parts = (*REASONING, *(self.family.tokens if has_tools else ()))
        added = self._tokenizer.added_tokens()
        names = sorted((name for name in added if any(part in name for part in parts)), key=len, reverse=True)
        return {name: added[name] for name in names}

    def call_constraint(
        self,
        schemas: Mapping[str, Mapping[str, Any]],
        strict: Collection[str],
        parallel: bool = True,
        content: Mapping[str, Any] | None = None,
    ) -> ConstraintSpec:
        """What an answer must be so that calls of the tools named in `strict` fit their schemas; the other arguments
        say what `strict_calls` says."""
        token_ids = self._parsed_tokens(has_tools=True)
        enforced = {name: schema if name in strict else None for name, schema in schemas.items()}
        return strict_calls(self.family.new_format(schemas), enforced, token_ids, REASONING, parallel, content)

    def check_length(self, text_bytes: int, most: int) -> None:
        """TextTooLong for messages whose texts, so many bytes together, have more than `most` tokens for certain."""
        self._tokenizer.check_length("the conversation", text_bytes, most)

    def close(self) -> None:
        """Ends the processes; a prompt that is rendered is rejected."""
        self._workers.close()


def _rejection(error: RenderFailure) -> RejectedMessages:
    if error.kind in ("variables", "documents", "chat_template"):
        return RejectedMessages(str(error), error.kind)
    if error.kind == "closed":
        return RejectedMessages("the chat template's process was ended: the server is shutting down")
    if error.kind == "limit":
        return RejectedMessages(f"the model's chat template {error} for these messages: shorten them, or see its card")
    return RejectedMessages(f"the model's chat template does not accept these messages ({error}): see its card")


def _folder_sources(folder: Path) -> dict[str, str]:
    """The templates of a folder by name: of its files, else of its tokenizer_config.json."""
    named = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    sources = {file.stem: read_text(file) for file in named}
    default = folder / "chat_template.jinja"
    if os.path.lexists(default):
        return {**sources, "default": read_text(default)}
    return _config_sources(folder / "tokenizer_config.json") | sources


def _config_sources(path: Path) -> dict[str, str]:
    """`chat_template` of a tokenizer_config.json: a text, or a list of objects with name and template."""
    source = read_object_if_present(path).get("chat_template")
    if source is None:
        return {}
    if is_text(source):
        return {"default": source}
    entries: list[Any] = source if isinstance(source, list) else [source]
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    if len(pairs) == len(entries) and all(is_text(name) and is_text(template) for name, template in pairs):
        return {str(name): str(template) for name, template in pairs}
    raise SoliError(
        f"{path}: chat_template is {shown(source)}; it must be text, or a list of objects with name and template"
    )
