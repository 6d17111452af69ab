"""`--set field=value`: what-ifs and overrides, as typed on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from soli.errors import SoliError


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read `["n_group=1", "rope_scaling=null"]` into a dict; a value is JSON where it parses as JSON, else text."""
    parsed: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not name:
            raise SoliError(f"--set {assignment!r} has no field and value; write --set field=value")
        if name in parsed:
            raise SoliError(f"--set gives {name} twice; give it once")
        parsed[name] = _value(text.strip())
    return parsed


def _value(text: str) -> Any:
    if text in ("None", "none", "True", "False"):
        text = {"None": "null", "none": "null"}.get(text, text.lower())
    try:
        return json.loads(text)
    except ValueError:
        return text
