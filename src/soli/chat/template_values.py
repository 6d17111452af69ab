"""What templates find in messages, where OpenAI's form and the templates' differ: null content, parts, arguments.

Templates of one family test `content is none`, those of another concatenate it; some loop over content parts, some take
text; some insert a call's arguments as text, some iterate over them. The values here are all of these at once, so that
each template sees the form that it was written for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment
from jinja2.filters import do_dictsort, do_items
from jinja2.tests import test_string


class NullContent(str):
    """The content of a message that has only tool calls: none to a template's tests, no text where it is inserted."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other is None or other == ""

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class ContentParts(str):
    """A list of content parts: their text joined where text is expected, the parts to a loop, an index or `length`."""

    parts: list[dict[str, Any]]

    def __new__(cls, parts: Sequence[Mapping[str, Any]]) -> "ContentParts":
        value = super().__new__(cls, "".join(part.get("text", "") for part in parts))
        value.parts = [dict(part) for part in parts]
        return value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, key: Any) -> Any:
        return self.parts[key]


class JsonText(str):
    """The arguments of a call: JSON as the model wrote it, which `tojson` leaves unchanged, and the object that it
    describes (`value`) to templates that iterate over it or look a key up. ValueError there for what is no object."""

    value: Any

    def __new__(cls, text: str, value: Any = None) -> "JsonText":
        arguments = super().__new__(cls, text)
        arguments.value = value
        return arguments

    @property
    def mapping(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise ValueError("the arguments of a call in an earlier message are not a JSON object")
        return self.value

    def items(self) -> Any:
        return self.mapping.items()

    def keys(self) -> Any:
        return self.mapping.keys()

    def values(self) -> Any:
        return self.mapping.values()

    def get(self, key: str, default: Any = None) -> Any:
        return self.mapping.get(key, default)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.mapping)

    def __getitem__(self, key: Any) -> Any:
        return self.mapping[key] if isinstance(key, str) else super().__getitem__(key)


def use_values(environment: Environment) -> None:
    """Teaches the tests and filters of an environment about these values."""
    environment.tests["none"] = lambda value: value is None or isinstance(value, NullContent)
    environment.tests["string"] = lambda value: (
        test_string(value) and not isinstance(value, NullContent | ContentParts)
    )
    environment.filters["tojson"] = to_json
    environment.filters["items"] = lambda value: do_items(_mapping(value))
    environment.filters["dictsort"] = lambda value, *options, **named: do_dictsort(_mapping(value), *options, **named)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter that `transformers` gives to templates: no HTML escapes, characters as they are."""
    if isinstance(value, JsonText):
        return value
    return json.dumps(
        _plain(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _mapping(value: Any) -> Any:
    return value.mapping if isinstance(value, JsonText) else value


def _plain(value: Any) -> Any:
    """`value` without the values of this module, as it was before."""
    if isinstance(value, NullContent):
        return None
    if isinstance(value, ContentParts):
        return value.parts
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
