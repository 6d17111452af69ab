"""Pairs from Android's own resources: the compiled table `resources.arsc` inside `framework-res.apk`.

The table is a tree of chunks (type u16, header size u16, size u32, little-endian; frameworks/base ResourceTypes.h): a
pool of all strings, then a package with one chunk per resource type and language. What has the same type and entry
number in English (no language) and in Chinese is a pair.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from soli.errors import SoliError
from soli.recipes.nano_corpus.cleaning import Simplifier
from soli.recipes.nano_corpus.fetch import read_members, zip_members
from soli.recipes.nano_corpus.sources.row import SourceRow, rows_by_key

STRING_POOL, TABLE, PACKAGE, TYPE = 0x0001, 0x0002, 0x0200, 0x0201
_UTF8, _COMPLEX, _SPARSE, _NO_ENTRY, _STRING_VALUE = 1 << 8, 1, 1, 0xFFFFFFFF, 3


def read_android(archives: list[Path]) -> Iterator[SourceRow]:
    """Android's texts in simplified Chinese, then Taiwan's."""
    for name, content in read_members(archives[0], "*/framework-res.apk"):
        for _, table in zip_members(content, name, "resources.arsc"):
            yield from _rows(read_table(table, name))


def _rows(texts: dict[str, dict[tuple[int, int], str]]) -> Iterator[SourceRow]:
    for language in ("zhCN", "zhTW"):
        simplify = Simplifier("tw2sp") if language == "zhTW" else str
        yield from rows_by_key(texts.get(language, {}), texts.get("", {}), simplify)


def read_table(table: bytes, name: str) -> dict[str, dict[tuple[int, int], str]]:
    """language with region ("" for the default) -> (type, entry number) -> text, of a compiled resource table."""
    if len(table) < 12 or struct.unpack_from("<H", table)[0] != TABLE:
        raise SoliError(f"{name} holds no compiled resource table: delete the package from the cache and build again")
    strings: list[str] = []
    texts: dict[str, dict[tuple[int, int], str]] = {}
    for kind, start, header, end in _chunks(table, 12, len(table)):
        if kind == STRING_POOL:
            strings = _strings(table, start)
        elif kind == PACKAGE:
            for inner, at, inner_header, _ in _chunks(table, start + header, end):
                if inner == TYPE:
                    language = _language(table, at)
                    entries = texts.setdefault(language, {})
                    for key, text in _entries(table, at, inner_header, strings):
                        entries.setdefault(key, text)  # the first configuration of a language is the plain one
    return texts


def _chunks(table: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(type, start, header size, end) of each chunk from `start` to `stop`."""
    while start + 8 <= stop:
        kind, header, size = struct.unpack_from("<HHI", table, start)
        if size < 8:
            return
        yield kind, start, header, start + size
        start += size


def _strings(table: bytes, start: int) -> list[str]:
    count, _, flags, strings_start, _ = struct.unpack_from("<5I", table, start + 8)
    offsets = struct.unpack_from(f"<{count}I", table, start + 28)
    read = _utf8_string if flags & _UTF8 else _utf16_string
    return [read(table, start + strings_start + offset) for offset in offsets]


def _utf8_string(table: bytes, at: int) -> str:
    at += 2 if table[at] & 0x80 else 1  # length in characters, then in bytes, each of one or two bytes
    length = table[at]
    at += 1
    if length & 0x80:
        length = (length & 0x7F) << 8 | table[at]
        at += 1
    return table[at : at + length].decode("utf-8", errors="replace")


def _utf16_string(table: bytes, at: int) -> str:
    (length,) = struct.unpack_from("<H", table, at)
    at += 2
    if length & 0x8000:
        (low,) = struct.unpack_from("<H", table, at)
        length = (length & 0x7FFF) << 16 | low
        at += 2
    return table[at : at + 2 * length].decode("utf-16-le", errors="replace")


def _language(table: bytes, at: int) -> str:
    language = table[at + 28 : at + 32]  # the configuration's language and region, two letters each, or zeros
    return language.replace(b"\0", b"").decode("ascii", errors="replace")


def _entries(table: bytes, at: int, header: int, strings: list[str]) -> Iterator[tuple[tuple[int, int], str]]:
    number, flags, _, count, first = struct.unpack_from("<BBHII", table, at + 8)
    if flags & _SPARSE:
        return
    for entry, offset in enumerate(struct.unpack_from(f"<{count}I", table, at + header)):
        if offset == _NO_ENTRY:
            continue
        size, entry_flags = struct.unpack_from("<HH", table, at + first + offset)
        kind, value = struct.unpack_from("<3xBI", table, at + first + offset + size)
        if not entry_flags & _COMPLEX and kind == _STRING_VALUE and value < len(strings):
            yield (number, entry), strings[value]
