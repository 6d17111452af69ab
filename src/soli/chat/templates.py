"""Chat templates of a model folder: messages to tokens.

The template (tokenizer_config.json or chat_template.jinja) is untrusted code and runs in jinja2's immutable sandbox.
What a person wrote stays text: an added token (`<|user|>`, `</think>`, a delimiter of tool calls) spelled out in a
message is broken by a marker before the template sees it and encoded in two parts, so that only the template's own
become tokens. Assistant messages keep their reasoning delimiters, which templates use to leave earlier reasoning out.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from soli.chat.deepseek import CLOSE, OPEN, ends_in_reasoning
from soli.data.tokenizer import Tokenizer, special_names
from soli.errors import SoliError
from soli.input_files import read_object_if_present, read_text
from soli.sections import is_text, shown

NO_REASONING = f"\n{CLOSE}\n\n"  # as DeepSeek-V3.1 writes it for an answer without reasoning


class JsonText(str):
    """JSON as the model wrote it, which `tojson` leaves unchanged: templates insert arguments with or without it."""


class RenderedPrompt(NamedTuple):
    """A prompt up to where the assistant's message starts; `starts_in_reasoning`: it starts inside `<think>`."""

    token_ids: list[int]
    starts_in_reasoning: bool


class ChatTemplate:
    """`source` is jinja2, `names` the special tokens by the names that templates use (bos_token). SoliError for a
    template that does not compile; `render` raises it for messages that the template does not accept."""

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        }
        try:
            self.supports_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise SoliError(f"the chat template does not compile ({error}): fetch the folder again") from error
        self._tokenizer = tokenizer
        self._names = dict(names)
        self._added_tokens = tokenizer.added_tokens()
        longest_first = sorted(self._added_tokens, key=len, reverse=True)
        self._added_token = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

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
    ) -> RenderedPrompt:
        """The prompt. `variables`: further variables of the template. `allow_reasoning` False: reasoning that the
        template opens is closed at once."""
        marker = f"\ue000{secrets.token_hex(8)}\ue001"
        reserved = {
            **self._names,
            "messages": [self._mark_message(message, marker) for message in messages],
            "tools": self._mark(tools, marker),
            "add_generation_prompt": True,
        }
        if clash := sorted(reserved.keys() & (variables or {}).keys()):
            raise SoliError(f"the chat template's variable {clash[0]} is set by the server: leave it out")
        try:
            text = self._template.render(self._mark(variables or {}, marker) | reserved)
        except Exception as error:  # a template may fail in any way that Python knows
            reason = " ".join(str(error).split())[:300]
            raise SoliError(
                f"the model's chat template does not accept these messages ({reason}): see its card"
            ) from error
        if not allow_reasoning and ends_in_reasoning(text):
            text = text.rstrip() + NO_REASONING
        return RenderedPrompt(self._encode(text, marker), ends_in_reasoning(text))

    def _mark_message(self, message: Mapping[str, Any], marker: str) -> Any:
        return self._mark(message, marker, (OPEN, CLOSE) if message.get("role") == "assistant" else ())

    def _mark(self, value: Any, marker: str, exempt: Sequence[str] = ()) -> Any:
        """`value` with the marker behind the first character of every added token in its strings, except `exempt`."""
        if isinstance(value, str):
            return type(value)(
                self._added_token.sub(
                    lambda match: match[0] if match[0] in exempt else match[0][0] + marker + match[0][1:], value
                )
            )
        if isinstance(value, Mapping):
            return {key: self._mark(item, marker, exempt) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(item, marker, exempt) for item in value]
        return value

    def _encode(self, text: str, marker: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for match in [*self._added_token.finditer(text), None]:
            for part in text[end : match.start() if match else None].split(marker):
                ids += self._tokenizer.encode(part)
            if match:
                ids.append(self._added_tokens[match[0]])
                end = match.end()
        return ids


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter that `transformers` gives to templates: no HTML escapes, characters as they are."""
    if isinstance(value, JsonText):
        return value
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
