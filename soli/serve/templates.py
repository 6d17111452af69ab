"""Chat templates of a model folder: messages to tokens.

The template (tokenizer_config.json or chat_template.jinja) is code of strangers and runs in jinja2's immutable sandbox.
What a person wrote stays text: a special token spelled out in a message is broken by a marker before the template sees
it, so only the template's own become tokens.
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
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError


class ChatTemplate:
    """`source` is jinja2. Refuses one that does not compile; `render` refuses messages that it cannot take."""

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise SoliError(f"the chat template does not compile ({error}): fetch the folder again") from error
        self._tokenizer, self._names = tokenizer, dict(names)
        self._specials = {token: tokenizer.token_id(token) for token in tokenizer.special_tokens()}
        self._special = re.compile("|".join(map(re.escape, sorted(self._specials, key=len, reverse=True))) or r"(?!)")
        self.knows_tools = bool(re.search(r"\btools\b", source))

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
    ) -> tuple[list[int], str]:
        """The prompt's tokens, up to where the assistant begins to speak, and its last characters."""
        marker = f"\ue000{secrets.token_hex(8)}\ue001"
        try:
            text = self._template.render(
                **(extra or {}),
                **self._names,
                messages=self._marked(messages, marker),
                tools=self._marked(tools, marker),
                add_generation_prompt=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise SoliError(
                f"the model's chat template does not take these messages ({error}): see its card"
            ) from error
        return self._encoded(text, marker), text[-64:]

    def _marked(self, value: Any, marker: str) -> Any:
        """`value` with every special token in its strings broken behind its first character."""
        if isinstance(value, str):
            return self._special.sub(lambda found: found[0][0] + marker + found[0][1:], value)
        if isinstance(value, Mapping):
            return {key: self._marked(item, marker) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(item, marker) for item in value]
        return value

    def _encoded(self, text: str, marker: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for found in self._special.finditer(text):
            ids += self._tokenizer.encode(text[at : found.start()].replace(marker, ""))
            ids.append(self._specials[found[0]])
            at = found.end()
        return ids + self._tokenizer.encode(text[at:].replace(marker, ""))


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
