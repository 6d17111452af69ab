"""What every JSON body has in common: null is absent, other unknown fields are rejected, and what changes no answer is
accepted: hints, and options of other engines with the values that ask for nothing."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

MAX_FIELDS = 96  # of an object, more than any here has


def _only(neutral: Any) -> Callable[[Any], Any]:
    """A check for options that have no other value than `neutral`."""

    def check(value: Any) -> Any:
        if value != neutral:
            raise ValueError("is not supported: leave it out")
        return value

    return check


# Options that exist elsewhere, with the one value that changes nothing. A Literal would take 0.0 for false.
Off = Annotated[bool, AfterValidator(_only(False)), WithJsonSchema({"type": "boolean", "const": False})]
On = Annotated[bool, AfterValidator(_only(True)), WithJsonSchema({"type": "boolean", "const": True})]
Zero = Annotated[float, AfterValidator(_only(0)), WithJsonSchema({"type": "number", "const": 0})]
One = Annotated[float, AfterValidator(_only(1)), WithJsonSchema({"type": "number", "const": 1})]
Empty = Annotated[list[Any], Field(max_length=0)]


def describe_any(schema: dict[str, Any]) -> None:
    """`_describe_nulls`, and that other fields are possible: a schema does not tell which of them are neutral."""
    _describe_nulls(schema)
    schema["additionalProperties"] = True


def _describe_nulls(schema: dict[str, Any]) -> None:
    """Says in the JSON schema of a class that optional fields and unknown ones may be null."""
    schema["additionalProperties"] = {"type": "null"}
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            outer = {key: field.pop(key) for key in ("title", "description", "default", "deprecated") if key in field}
            schema["properties"][name] = {"anyOf": [*field.get("anyOf", [field]), {"type": "null"}], **outer}


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_describe_nulls)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        if len(fields) > MAX_FIELDS:
            raise ValueError(f"has {len(fields):,} fields, of which at most {len(cls.model_fields)} are known")
        return {name: value for name, value in fields.items() if value is not None}


class Hints(RequestBody):
    """What a caller may say about itself and its wishes for billing, storage and caches: accepted, and unused."""

    user: str | None = None
    metadata: dict[str, Any] = {}
    store: bool = False
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class OtherOptions(RequestBody):
    """Options of vLLM that are not supported here, and so only have the values that change nothing."""

    use_beam_search: Off = False
    early_stopping: Off = False
    length_penalty: One = 1.0
    spaces_between_special_tokens: On = True
    include_stop_str_in_output: Off = False
    return_tokens_as_token_ids: Off = False
    return_token_ids: Off = False
    bad_words: Empty = []
    logits_processors: Empty = []
    priority: Zero = 0.0
