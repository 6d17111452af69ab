"""Logit bias and output constraints from command-line options: assignments, a schema's file, an expression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from soli.errors import SoliError

if TYPE_CHECKING:
    from soli.engine.constraint import ConstraintSpec

MAX_FILE_BYTES = 262_144  # bytes: four for each character that a schema may have


def logit_bias(entries: Sequence[str]) -> dict[int, float]:
    """Reads `["506=-100", "12=2.5"]`; a token's id, then what is added to its logit."""
    biases: dict[int, float] = {}
    for entry in entries:
        token, _, bias = entry.partition("=")
        try:
            number, value = int(token), float(bias)
        except ValueError:
            raise SoliError(f"--logit-bias {entry!r} is not TOKEN=NUMBER: write for instance 506=-100") from None
        if number in biases:
            raise SoliError(f"--logit-bias names token {number} twice: name it once")
        biases[number] = value
    return biases


def constraint_spec(json_schema: str | None, regex: str | None) -> ConstraintSpec | None:
    """What the text must be, by a file with a JSON schema or by a regular expression; None where neither is given."""
    if json_schema is not None and regex is not None:
        raise SoliError("--json-schema and --regex cannot hold together: give one of them")
    if json_schema is None and regex is None:
        return None
    from soli.engine.constraint import ConstraintSpec

    if json_schema is None:
        return ConstraintSpec.regex(regex or "")
    with open(json_schema, "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise SoliError(f"{json_schema} is longer than the limit of {MAX_FILE_BYTES:,} bytes for a schema")
    try:
        return ConstraintSpec.json_schema(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise SoliError(f"{json_schema} is not valid UTF-8: convert it to UTF-8") from None
