"""Text of a user: an argument, a file, or standard input. What cannot be text is a SoliError."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO, TypeVar

from soli.errors import SoliError

T = TypeVar("T")

LONGEST_LINE = 65_536  # bytes; far more than a small model's positions, far less than would fill the memory


def argument_lines(text: str, name: str) -> list[str]:
    """The lines of a command-line argument; rejects an empty one and bytes that are not UTF-8."""
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise SoliError(f"{name} is not valid UTF-8: give it in that encoding") from None
    if not text.strip():
        raise SoliError(f"{name} is empty: give some text, or - to read it from standard input")
    if size > LONGEST_LINE:
        raise SoliError(f"{name} is {size:,} bytes long; the limit is {LONGEST_LINE:,}: split it")
    return text.splitlines()


def stdin_lines() -> Iterator[str]:
    """Lines of standard input without their ends, read lazily; a bad one is rejected by its number."""
    return _lines(sys.stdin.buffer, "standard input")


def file_lines(path: str) -> Iterator[str]:
    """Lines of a text file, under the same rules; a FIFO that nobody writes to is empty."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        os.set_blocking(stream.fileno(), True)
        yield from _lines(stream, path)


def _lines(stream: BinaryIO, name: str) -> Iterator[str]:
    def read_line() -> bytes:
        try:
            return stream.readline(LONGEST_LINE + 2)
        except OSError as error:
            raise SoliError(f"{name} cannot be read ({error.strerror or error})") from None

    for number, line in enumerate(iter(read_line, b""), start=1):
        where = f"line {number} of {name}"
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(text) > LONGEST_LINE:
            raise SoliError(f"{where} is longer than the limit of {LONGEST_LINE:,} bytes: break it into several lines")
        try:
            yield text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SoliError(f"{where} is not valid UTF-8 (byte {error.start + 1}): convert the text to UTF-8") from None


def file_texts(path: str) -> list[str]:
    """The texts of a file, one per line, without empty ones.

    A .tsv is read as the corpus step writes it: of `source, zh, en` the two texts, of `language, source, text` the
    text.
    """
    texts: list[str] = []
    for number, line in enumerate(file_lines(path), start=1):
        if not path.endswith(".tsv"):
            texts.append(line)
            continue
        fields = line.split("\t")
        if len(fields) != 3:
            raise SoliError(f"line {number} of {path} has {len(fields)} columns: a .tsv needs three, source, zh and en")
        texts.extend(fields[2:] if fields[0] in ("en", "zh") else fields[1:])
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise SoliError(f"{path} holds no text: give a file with some lines")
    return texts


def file_pairs(path: str) -> list[tuple[str, str, str]]:
    """Rows of a pairs file: source, zh, en, separated by tabs."""
    pairs = []
    for number, line in enumerate(file_lines(path), start=1):
        fields = line.split("\t")
        if len(fields) != 3 or not all(field.strip() for field in fields):
            raise SoliError(f"line {number} of {path} is not a pair: it needs source, zh and en, separated by tabs")
        pairs.append((fields[0], fields[1], fields[2]))
    if not pairs:
        raise SoliError(f"{path} holds no pair: give a file with lines of source, zh and en, separated by tabs")
    return pairs


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items, at even distances, so that every part of a file is represented."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]
