"""Which JSON schemas can be enforced: every keyword must be one that llguidance enforces, or one that only describes.

llguidance itself refuses keywords of the current standard that it does not implement; this check comes first and also
refuses those of older drafts and dialects (`nullable`, `additionalItems`), which it would pass over in silence, its own
switch for leniency (`x-guidance`), and schemas of a size or depth that nobody writes by hand.
"""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from soli.errors import SoliError

LONGEST = 65_536  # characters
DEEPEST = 48  # schemas inside schemas
MAPS = {"properties", "patternProperties", "$defs", "definitions"}
LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
SINGLE = {"items", "additionalProperties"}
NUMBERS = {
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
}  # fmt: skip
PLAIN = {"type", "const", "enum", "$ref", "required", "pattern", "format"}
DESCRIBING = {
    "$schema", "$id", "$comment", "title", "description", "default", "examples",
    "readOnly", "writeOnly", "deprecated",
}  # fmt: skip


def checked_schema(schema: Mapping[str, Any] | str) -> str:
    """The schema, an object or its JSON, as JSON; a SoliError names the keyword that cannot be enforced and where."""
    try:
        parsed = json.loads(schema, parse_constant=_no_constant) if isinstance(schema, str) else schema
        text = json.dumps(parsed, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise SoliError(f"the JSON schema is not JSON ({error}): give a JSON object") from None
    if len(text) > LONGEST:
        raise SoliError(f"the JSON schema has {len(text):,} characters: the limit is {LONGEST:,}")
    _check(parsed, "", 0)
    return text


def _check(schema: Any, where: str, depth: int) -> None:
    if isinstance(schema, bool) and depth:
        return
    if not isinstance(schema, Mapping):
        raise SoliError(f"the JSON schema has {_short(schema)} at {where or 'its root'}: give an object there")
    if depth > DEEPEST:
        raise SoliError(f"the JSON schema is nested more than {DEEPEST} deep: use $defs and $ref")
    for key, value in schema.items():
        place = f"{where}/{key}"
        if key in MAPS and isinstance(value, Mapping):
            for name, one in value.items():
                _check(one, f"{place}/{name}", depth + 1)
        elif key in LISTS and isinstance(value, list):
            for number, one in enumerate(value):
                _check(one, f"{place}/{number}", depth + 1)
        elif key in SINGLE:
            _check(value, place, depth + 1)
        elif key in MAPS | LISTS or (
            key in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float))
        ):
            raise SoliError(f"the JSON schema has {_short(value)} at {place}, which means nothing there: mend it")
        elif not (key in NUMBERS | PLAIN | DESCRIBING or (key.startswith("x-") and key != "x-guidance")):
            raise SoliError(f"the JSON schema uses {key!r} at {place}, which cannot be enforced: leave it out")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
