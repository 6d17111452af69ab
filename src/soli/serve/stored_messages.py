"""Messages as clients store what they were given, read as the messages that they were.

What a client was given it may send back: as `model_dump()` of the openai package, from a stream's deltas put together,
or with fields of other engines. So a field that is null or empty is absent, known or not, and fields that repeat what
others say are ignored. A field that would change the prompt and cannot be used is rejected by name.
"""

from collections.abc import Collection
from typing import Any

# Said by other fields already, or of no use for a prompt.
REDUNDANT = {
    "annotations",
    "cache_control",
    "index",
    "parsed",
    "parsed_arguments",
    "parsed_output",
    "provider_specific_fields",
    "reasoning_details",
    "thinking_blocks",
}
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")  # Soli's and older engines', vLLM's, transformers'


def is_neutral(value: Any) -> bool:
    """Whether a value says nothing: null, an empty text, list or object, or one that holds only such values."""
    if isinstance(value, dict):
        return all(map(is_neutral, value.values()))
    if isinstance(value, list):
        return all(map(is_neutral, value))
    return value is None or value == ""


def without_nulls(value: Any) -> Any:
    """A JSON value without the fields that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def meaningful_fields(fields: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The fields of an object of a message that are not null, nor redundant, and known or not empty."""
    return {
        name: value
        for name, value in fields.items()
        if value is not None and (name in known or not (name in REDUNDANT or is_neutral(value)))
    }


def with_reasoning(fields: dict[str, Any]) -> dict[str, Any]:
    """A message with its reasoning under the first of its names."""
    texts = [fields[name] for name in REASONING_NAMES if isinstance(fields.get(name), str)]
    if not any(texts):
        return fields
    others = {name: value for name, value in fields.items() if name not in REASONING_NAMES}
    return others | {REASONING_NAMES[0]: next(filter(None, texts))}


def joined_deltas(entries: list[Any]) -> list[Any]:
    """Tool calls of which some are deltas of a stream: one without a name continues the call of its index."""
    calls: list[Any] = []
    by_index: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        function = entry.get("function") if isinstance(entry, dict) else None
        if not isinstance(function, dict):
            calls.append(entry)
            continue
        begun = by_index.get(entry.get("index"))
        if begun is None or function.get("name"):
            begun = {**entry, "function": dict(function)}
            calls.append(begun)
            by_index[entry.get("index")] = begun
        elif isinstance(function.get("arguments"), str):
            begun["function"]["arguments"] = (begun["function"].get("arguments") or "") + function["arguments"]
    return calls
