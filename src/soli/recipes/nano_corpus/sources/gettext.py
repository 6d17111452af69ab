"""Translations compiled by gettext (.mo): the game Cataclysm, LibreOffice's interface, Django.

Format: GNU gettext manual, "The Format of GNU MO Files". A message's context ends at \\x04, its plural follows \\0; the
Chinese side has one form for both numbers.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from soli.errors import SoliError
from soli.recipes.nano_corpus.cleaning import Simplifier, align, without_accelerators
from soli.recipes.nano_corpus.fetch import read_members
from soli.recipes.nano_corpus.sources.row import SourceRow

_COLOUR = re.compile(r"</?color[^<>]*>")


def read_mo(content: bytes, name: str) -> Iterator[tuple[str, str]]:
    """(English, translation) of every message of a .mo file; a plural is a message of its own."""
    if len(content) < 20 or content[:4] not in (b"\xde\x12\x04\x95", b"\x95\x04\x12\xde"):
        raise SoliError(f"{name} is not a compiled gettext file: delete the package from the cache and build again")
    order = "<" if content[0] == 0xDE else ">"
    count, originals, translations = struct.unpack(order + "8xIII", content[:20])
    for i in range(count):
        english, chinese = (_string(content, order, table + 8 * i) for table in (originals, translations))
        forms = english.rpartition("\x04")[2].split("\0")
        for form in forms if forms != [""] else []:
            yield form, chinese.split("\0")[-1]


def _string(content: bytes, order: str, at: int) -> str:
    length, start = struct.unpack_from(order + "II", content, at)
    return content[start : start + length].decode("utf-8", errors="replace")


def read_cataclysm(archives: list[Path]) -> Iterator[SourceRow]:
    """The game's sentences in both translations, the mainland's first, Taiwan's converted to the mainland's words.

    Colour tags are removed and paragraphs split where both sides have as many sentences.
    """
    simplify = Simplifier("tw2sp")
    for name, content in sorted(read_members(archives[0], "*/zh_*/LC_MESSAGES/*.mo")):
        for english, chinese in read_mo(content, name):
            text = simplify(chinese) if "/zh_TW/" in name else chinese
            for zh, en in align(_one_line(_COLOUR.sub("", text)), _one_line(_COLOUR.sub("", english))):
                yield SourceRow(zh, en)


def read_libreoffice(archives: list[Path]) -> Iterator[SourceRow]:
    """Interface strings of LibreOffice in simplified Chinese, without accelerators."""
    for name, content in read_members(archives[0], "*/LC_MESSAGES/*.mo"):
        for english, chinese in read_mo(content, name):
            yield SourceRow(without_accelerators(chinese), without_accelerators(english))


def read_libreoffice_taiwan(archives: list[Path]) -> Iterator[SourceRow]:
    """The same in Taiwan's words and characters, converted to the mainland's."""
    simplify = Simplifier("tw2sp")
    for zh, en, tag in read_libreoffice(archives):
        yield SourceRow(simplify(zh), en, tag)


def read_django(archives: list[Path]) -> Iterator[SourceRow]:
    """Django's own messages, Taiwan's converted to the mainland's words and characters."""
    simplify = Simplifier("tw2sp")
    for name, content in read_members(archives[0], "*/locale/zh_Han?/LC_MESSAGES/*.mo"):
        for english, chinese in read_mo(content, name):
            yield SourceRow(simplify(chinese) if "/zh_Hant/" in name else chinese, english)


_CATALOGUE = re.compile(r"/(zh|zh_CN|zh_Hans|zh_Hans_CN|zh_TW|zh_Hant|zh_Hant_TW)/LC_MESSAGES/[^/]+\.[mp]o$")


def read_catalogues(archives: list[Path]) -> Iterator[SourceRow]:
    """Every Chinese catalogue of a package, compiled where it is, else its source; the same texts once."""
    simplify = Simplifier("tw2sp")
    catalogues: dict[str, tuple[str, bytes]] = {}
    for name, content in read_members(archives[0], "*/LC_MESSAGES/*.[mp]o"):
        if _CATALOGUE.search(name) and (name.endswith(".mo") or name[:-3] not in catalogues):
            catalogues[name[:-3]] = name, content
    for name, content in catalogues.values():
        messages = read_mo(content, name) if name.endswith(".mo") else read_po(content.decode("utf-8"))
        taiwan = "/zh_TW/" in name or "/zh_Hant" in name
        for english, chinese in messages:
            text = simplify(chinese) if taiwan else chinese
            yield from (SourceRow(*pair) for pair in align(without_accelerators(text), without_accelerators(english)))


def read_po(text: str) -> Iterator[tuple[str, str]]:
    """(English, translation) of every message of a .po file that is translated and not marked as fuzzy."""
    for entry in text.split("\n\n"):
        if re.search(r"^#,.*\bfuzzy\b", entry, re.MULTILINE):
            continue
        fields: dict[str, str] = {}
        name = ""
        for line in entry.splitlines():
            match = _PO_LINE.match(line)
            if match is None:
                continue
            name = match[1] or name
            fields[name] = fields.get(name, "") + _PO_ESCAPE.sub(lambda m: _PO_ESCAPES.get(m[1], m[1]), match[2])
        chinese = fields.get("msgstr") or fields.get("msgstr[0]", "")
        if fields.get("msgid") and chinese:
            yield fields["msgid"], chinese


_PO_LINE = re.compile(r"^(?:(msgctxt|msgid|msgid_plural|msgstr(?:\[\d\])?) )?\"(.*)\"\s*$")
_PO_ESCAPE = re.compile(r"\\(.)")
_PO_ESCAPES = {"n": " ", "t": " "}


def _one_line(text: str) -> str:
    return " ".join(text.split())
