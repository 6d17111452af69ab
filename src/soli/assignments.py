"""`--set FIELD=VALUE` of the command line, the same for every verb.

A value is TOML (`3`, `1e-3`, `true`, `[1, 2]`, `"text"`), or plain text where it is not TOML; `null` and `none` unset.
"""

import datetime
import tomllib
from collections.abc import Iterable
from typing import Any

from soli.errors import SoliError

_WORDS = {"null": None, "none": None, "None": None, "True": True, "False": False}


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read `["n_group=1", "rope_scaling=null"]` into a dictionary by name; None for a name that is to be unset."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not name:
            raise SoliError(f"--set {assignment!r} is not of the form FIELD=VALUE")
        if name in values:
            raise SoliError(f"--set gives {name} twice; give it once")
        values[name] = parse_value(text.strip())
    return values


def parse_value(text: str) -> Any:
    """One value: null or none, TOML, else the text itself (dates too, which no field of Soli holds)."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table.pop("value")
    return text if table or isinstance(value, datetime.date | datetime.time) else value
