"""Files that anybody may have written, read within limits: regular files, of bounded size, strict UTF-8, strict JSON.

Opening never waits, as it would for a FIFO without a writer, and a file's size is checked before a byte is read. JSON
is rejected where readers disagree on its meaning or where it costs more than it can be worth: duplicate keys, NaN and
infinities, numbers of hundreds of digits, deep nesting, half a surrogate pair. Every error is a SoliError that names
the file and the place in it.
"""

import codecs
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from soli.errors import SoliError

DOCUMENT_BYTES: Final = 4 * 2**20  # of a configuration, a state, a template: files of kilobytes
TABLE_BYTES: Final = 100_000_000  # of a tokenizer or an index, which list a vocabulary or all tensors
LINE_BYTES: Final = 2**20  # of a line of a file that Soli writes line by line
VALUES: Final = 4_000_000  # in one JSON document: a list of empty lists takes 16 times the memory of its text
DIGITS: Final = 100  # of a number; 10**100 is still finite as a float
NESTING: Final = 100  # lists and objects inside each other

_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, open for reading bytes; SoliError for anything else, without waiting for it."""
    try:
        _check_regular(path, os.stat(path).st_mode)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stream = os.fdopen(handle, "rb")
    except OSError as error:
        raise SoliError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError:  # a NUL byte, or half a surrogate pair
        raise SoliError(f"{str(path)!r}: cannot be read (no file can have this name)") from None
    try:
        _check_regular(path, os.fstat(handle).st_mode)  # what was there before may have been replaced
    except SoliError:
        stream.close()
        raise
    return stream


def read_bytes(path: str | Path, limit: int = DOCUMENT_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    with open_regular(path) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(limit + 1) if size <= limit else b""
        except OSError as error:
            raise SoliError(f"{path}: cannot be read ({error.strerror or error})") from None
    if max(size, len(data)) > limit:
        raise SoliError(f"{path}: is {max(size, len(data)):,} bytes long, but such a file has at most {limit:,}")
    return data


def read_text(path: str | Path, limit: int = DOCUMENT_BYTES) -> str:
    """The text of a regular file in UTF-8; a byte order mark at its beginning is dropped."""
    return decode(read_bytes(path, limit).removeprefix(codecs.BOM_UTF8), str(path))


def decode(data: bytes, where: str) -> str:
    """Bytes as UTF-8; SoliError with the first byte that is not, or for a byte order mark."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SoliError(f"{where}: not valid UTF-8 at byte {error.start + 1}; convert it to UTF-8") from None
    if text.startswith("\ufeff"):
        raise SoliError(f"{where}: begins with a byte order mark; save it as UTF-8 without one")
    return text


def read_json(path: str | Path, limit: int = DOCUMENT_BYTES) -> Any:
    """The value in a JSON file of at most `limit` bytes, every rule above checked."""
    return parse_json(read_text(path, limit), str(path))


def read_object(path: str | Path, limit: int = DOCUMENT_BYTES) -> dict[str, Any]:
    """The JSON object in a file."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise SoliError(f"{path}: must hold a JSON object, not {kind_of(value)}")
    return value


def read_object_if_present(path: Path, limit: int = DOCUMENT_BYTES) -> dict[str, Any]:
    """The JSON object in a file that may be absent: empty then. Whatever else has its name is an error."""
    return read_object(path, limit) if os.path.lexists(path) else {}


def read_lines(path: str | Path, limit: int = LINE_BYTES) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line of a regular file, with its line break where it has one; one line in memory."""
    with open_regular(path) as stream:
        for number, line in enumerate(iter(lambda: read_line(stream, path, limit + 1), b""), 1):
            if len(line) > limit:
                raise SoliError(f"{path}, line {number}: is longer than {limit:,} bytes")
            yield number, line


def read_line(stream: BinaryIO, path: str | Path, limit: int) -> bytes:
    """The next line of a file, or its first `limit` bytes; SoliError where the disk fails."""
    try:
        return stream.readline(limit)
    except OSError as error:
        raise SoliError(f"{path}: cannot be read ({error.strerror or error})") from None


def kind_of(value: Any) -> str:
    """What a JSON value is, for an error."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def parse_json(text: str, where: str, finite: bool = True) -> Any:
    """The value of a JSON text; `where` is named in errors. `finite` False allows NaN and Infinity, which Python writes
    into logs."""
    if sum(map(text.count, ",[{")) > VALUES:
        raise SoliError(f"{where}: holds more than {VALUES:,} values")

    def reject(literal: str, reason: str, position: int) -> NoReturn:
        line = text.count("\n", 0, max(0, position)) + 1
        shown = literal if len(literal) <= 40 else f"{literal[:40]}..."
        raise SoliError(f"{where}: not valid JSON (line {line}: {shown} {reason})")

    def number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
        def parse(literal: str) -> Any:
            if len(literal) > DIGITS:
                reject(literal, f"has more than {DIGITS} digits", text.find(literal))
            value = kind(literal)
            if isinstance(value, float) and not math.isfinite(value):
                reject(literal, "is too large for a number", text.find(literal))
            return value

        return parse

    def constant(literal: str) -> float:
        if finite:
            reject(literal, "is not a JSON number", text.find(literal))
        return float(literal)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
            reject(json.dumps(repeated), "is given twice", text.rfind(json.dumps(repeated, ensure_ascii=False)))
        return table

    try:
        value = json.loads(
            text, parse_int=number(int), parse_float=number(float), parse_constant=constant, object_pairs_hook=unique
        )
    except RecursionError:
        raise SoliError(f"{where}: not valid JSON (nested more than {NESTING} levels deep)") from None
    except ValueError as error:
        raise SoliError(f"{where}: not valid JSON ({error})") from None
    if is_nested_too_deeply(value):
        raise SoliError(f"{where}: not valid JSON (nested more than {NESTING} levels deep)")
    if _SURROGATE.search(text):
        _check_surrogates(value, where)
    return value


def is_nested_too_deeply(value: Any) -> bool:
    """Whether a value has more than NESTING lists and tables inside each other: to print it may overflow the stack."""
    items = [value]
    for _ in range(NESTING + 1):
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
        items = [item for holder in level for item in (holder.values() if isinstance(holder, dict) else holder)]
    return True


def _check_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for holds, name in _KINDS if holds(mode)), "no file")
        raise SoliError(f"{path}: cannot be read (it is {kind}, not a regular file)")


def _check_surrogates(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        near = ascii(error.object[max(0, error.start - 20) : error.end])
        raise SoliError(f"{where}: not valid JSON (half a surrogate pair, which is no character, at {near})") from None
