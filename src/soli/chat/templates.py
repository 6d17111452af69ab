"""Chat templates of a model folder: messages to tokens.

The template (tokenizer_config.json or chat_template.jinja) is code of strangers and runs in jinja2's immutable sandbox.
What a person wrote stays text: an added token (`<|user|>`, `</think>`, a mark of tool calls) spelled out in a message
is broken by a marker before the template sees it, and encoded in two parts, so only the template's own become tokens.
Assistant messages keep their think marks, which templates look for to leave earlier reasoning out.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from soli.chat.reasoning import CLOSE, OPEN, ends_thinking
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError

NO_REASONING = f"\n{CLOSE}\n\n"  # as DeepSeek-V3.1 writes it where it does not think


class JsonText(str):
    """JSON as the model wrote it, which `tojson` leaves as it is: templates join a call's arguments with or without."""


class ChatTemplate:
    """`source` is jinja2, `names` the special tokens by the names that templates use (bos_token). Refuses one that does
    not compile; `render` refuses messages that it cannot take."""

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self.knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise SoliError(f"the chat template does not compile ({error}): fetch the folder again") from error
        self._tokenizer, self._names = tokenizer, dict(names)
        self._added = tokenizer.added_tokens()
        self._token = re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) or r"(?!)")

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The folder's template; None where there is none."""
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
        if not isinstance(source, str):
            return None
        entries = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        named = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in entries.items()}
        return cls(source, tokenizer, {name: text for name, text in named.items() if isinstance(text, str)})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
        think: bool = True,
    ) -> tuple[list[int], bool]:
        """The prompt's tokens, up to where the assistant begins to speak, and whether it does so thinking.

        `extra`: further variables of the template. `think` False: reasoning that the template begins ends at once.
        """
        marker = f"\ue000{secrets.token_hex(8)}\ue001"
        ours = {
            **self._names,
            "messages": [self._message(message, marker) for message in messages],
            "tools": self._marked(tools, marker),
            "add_generation_prompt": True,
        }
        if clash := sorted(ours.keys() & (extra or {}).keys()):
            raise SoliError(f"the chat template's variable {clash[0]} is the server's to set: leave it out")
        try:
            text = self._template.render(self._marked(extra or {}, marker) | ours)
        except Exception as error:  # a template may fail in any way that Python knows
            said = " ".join(str(error).split())[:300]
            raise SoliError(f"the model's chat template does not take these messages ({said}): see its card") from error
        if not think and ends_thinking(text):
            text = text.rstrip() + NO_REASONING
        return self._encoded(text, marker), ends_thinking(text)

    def _message(self, message: Mapping[str, Any], marker: str) -> Any:
        return self._marked(message, marker, (OPEN, CLOSE) if message.get("role") == "assistant" else ())

    def _marked(self, value: Any, marker: str, kept: Sequence[str] = ()) -> Any:
        """`value` with every added token in its strings, but those `kept`, broken behind its first character."""
        if isinstance(value, str):
            return type(value)(
                self._token.sub(lambda at: at[0] if at[0] in kept else at[0][0] + marker + at[0][1:], value)
            )
        if isinstance(value, Mapping):
            return {key: self._marked(item, marker, kept) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(item, marker, kept) for item in value]
        return value

    def _encoded(self, text: str, marker: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for found in [*self._token.finditer(text), None]:
            for part in text[at : found.start() if found else None].split(marker):
                ids += self._tokenizer.encode(part)
            if found:
                ids.append(self._added[found[0]])
                at = found.end()
        return ids


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As `transformers` gives it to templates: no HTML escapes, characters as they are."""
    if isinstance(value, JsonText):
        return value
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
