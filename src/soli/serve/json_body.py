"""JSON bodies: strict, and counted before they are parsed.

Parsing holds the interpreter's lock, so a body of a million small values would stop every stream for that time. Values
are counted in the bytes first, lists of numbers by their commas. No NaN, no lone surrogates, no nesting that exhausts
the stack.
"""

import asyncio
import re
from typing import Any

from pydantic_core import from_json

from soli.serve.errors import BodyError

MAX_VALUES = 50_000  # texts, keys, lists and objects of a body
MAX_NUMBERS = 2**20  # commas, which are one fewer than the values of a list
SMALL_BODY = 2**14  # bytes; parsed at once
# A string, a bracket, or a run of anything else; each in linear time, and `"?` for a string that never ends.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[{}\[\]]|[^"{}\[\]]+', re.DOTALL)


async def parse_body(body: bytes) -> Any:
    """The value of a JSON body. BodyError for one with too many values, which names the field, and for what is not
    JSON."""
    if len(body) <= SMALL_BODY:
        return _parse(body)
    return await asyncio.to_thread(_parse_counted, body)


def _parse_counted(body: bytes) -> Any:
    most = sum(body.count(character) for character in (b",", b"{", b"[")) + body.count(b'"') // 2
    if most > MAX_VALUES:
        check_counts(body)
    return _parse(body)


def check_counts(body: bytes) -> None:
    """BodyError for more values than a body may have."""
    depth = values = commas = 0
    field = b""  # the key of the top level that was read last
    for match in _TOKEN.finditer(body):
        token = match[0]
        if token[:1] == b'"':
            values += 1
            field = token if depth == 1 else field
        elif token in (b"{", b"["):
            depth += 1
            values += 1
        elif token in (b"}", b"]"):
            depth -= 1
        else:
            commas += token.count(b",")
        if values > MAX_VALUES or commas > MAX_NUMBERS:
            limit = f"{MAX_VALUES:,} texts and objects" if values > MAX_VALUES else f"{MAX_NUMBERS:,} numbers"
            name = (field[1:-1].decode("utf-8", "replace")[:80] if depth > 1 else "") or None
            raise BodyError(f"{name or 'the body'} holds more than {limit}, the limit of a request: send less", name)


def _parse(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BodyError(f"the body is not JSON: {error}") from error
