"""Pairs from browsers: Chromium's resource packs, and the Fluent and property files of Firefox and Thunderbird.

Chromium keeps one .pak file per language in which a text has the same number in all of them. Mozilla's programs have
their English texts in `omni.ja` and their translations in a language pack, both zip files with the same paths inside.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from soli.errors import SoliError
from soli.recipes.nano_corpus.cleaning import Simplifier, without_accelerators
from soli.recipes.nano_corpus.fetch import read_members, zip_members
from soli.recipes.nano_corpus.sources.row import SourceRow, rows_by_key

_PAK_VERSION, _PAK_HEADER, _PAK_ENTRY = 5, 12, 6
_LANGUAGE = r"(?:en-US|zh-CN|zh-TW)"
_LANGUAGE_FOLDER = re.compile(rf"^(?:\w+/)?(?:localization/{_LANGUAGE}/|chrome/{_LANGUAGE}/locale/(?:{_LANGUAGE}/)?)")
_FLUENT_ENTRY = re.compile(r"^(-?[A-Za-z][\w-]*) *= ?(.*)$")
_FLUENT_ATTRIBUTE = re.compile(r"^ +\.([A-Za-z][\w-]*) *= ?(.*)$")
_ACCESS_KEY = re.compile(r"access-?key$|\.key$|commandkey", re.IGNORECASE)


def read_pak(content: bytes, name: str) -> dict[int, str]:
    """resource id -> text of a Chromium resource pack of version 5 in UTF-8 (ui/base/resource/data_pack.cc)."""
    if len(content) < _PAK_HEADER or struct.unpack_from("<I", content)[0] != _PAK_VERSION:
        raise SoliError(f"{name} is not a resource pack of version {_PAK_VERSION}: delete the package from the cache")
    (count,) = struct.unpack_from("<H", content, 8)
    entries = [struct.unpack_from("<HI", content, _PAK_HEADER + _PAK_ENTRY * i) for i in range(count + 1)]
    texts = {}
    for (number, start), (_, stop) in pairwise(entries):
        if start < stop <= len(content):
            texts[number] = content[start:stop].decode("utf-8", errors="replace")
    return texts


def read_chromium(archives: list[Path]) -> Iterator[SourceRow]:
    """Chromium's texts in simplified Chinese, then Taiwan's."""
    packs = {}
    for archive in archives:
        for name, content in read_members(archive, "usr/lib/chromium/locales/*.pak"):
            language = Path(name).stem
            if language in ("en-US", "zh-CN", "zh-TW"):
                texts = read_pak(content, name)
                packs[language] = {number: without_accelerators(text) for number, text in texts.items()}
    for language in ("zh-CN", "zh-TW"):
        simplify = Simplifier("tw2sp") if language == "zh-TW" else str
        yield from rows_by_key(packs.get(language, {}), packs.get("en-US", {}), simplify)


def parse_fluent(text: str) -> Iterator[tuple[str, str]]:
    """(message id or id.attribute, text) of a Fluent file; lines of one text are joined. Selectors are left out."""
    entry, attribute, lines = "", "", list[str]()
    for line in [*text.splitlines(), "end ="]:
        start, inner = _FLUENT_ENTRY.match(line), _FLUENT_ATTRIBUTE.match(line)
        if start is None and inner is None:
            if line.startswith(" ") and lines:
                lines.append(line.strip())
            continue
        value = " ".join(part for part in lines if part)
        if value and "->" not in value:
            yield (f"{entry}.{attribute}" if attribute else entry), value
        if start is not None:
            entry, attribute, lines = start[1], "", [start[2].strip()]
        elif inner is not None:
            attribute, lines = inner[1], [inner[2].strip()]


def parse_properties(text: str) -> Iterator[tuple[str, str]]:
    """(key, text) of a Java-style property file as Mozilla writes them."""
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.lstrip().startswith(("#", "!")):
            yield key.strip(), value.strip()


def mozilla_texts(archive: bytes, name: str) -> dict[tuple[str, str], str]:
    """(path without its language, key) -> text of every Fluent and property file of an omni.ja or a language pack."""
    texts = {}
    for path, content in zip_members(archive, name, "*.ftl", "*.properties"):
        if _LANGUAGE_FOLDER.match(path) is None:
            continue
        parse = parse_fluent if path.endswith(".ftl") else parse_properties
        page = _LANGUAGE_FOLDER.sub("", path)
        for key, text in parse(content.decode("utf-8", errors="replace")):
            if not _ACCESS_KEY.search(key):
                texts[page, key] = text
    return texts


def read_mozilla(archives: list[Path]) -> Iterator[SourceRow]:
    """A program's texts beside those of its language packs: the program's package first, then the packs."""
    english: dict[tuple[str, str], str] = {}
    for name, content in read_members(archives[0], "*/omni.ja"):
        english |= mozilla_texts(content, name)
    for archive in archives[1:]:
        for name, content in read_members(archive, "*.xpi"):
            simplify = Simplifier("tw2sp") if "zh-TW" in name else str
            yield from rows_by_key(mozilla_texts(content, name), english, simplify)
