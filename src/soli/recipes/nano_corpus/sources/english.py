"""English text of one language: documentation, glosses, novels, a dictionary of wit. One paragraph a row."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from soli.errors import SoliError
from soli.recipes.nano_corpus.cleaning import is_prose, tidy
from soli.recipes.nano_corpus.fetch import MEMBER_BYTES, gunzip, read_members
from soli.recipes.nano_corpus.sources.row import SourceRow

_SHORTEST = 40
_ROLE = re.compile(r":[a-z:]+:`[~!]?([^`<]*?)(?:\s*<[^`>]*>)?`")
_RST_BLOCK = re.compile(r"\n\s*\n|\n(?=\s*[*\-] )")
_RST_NO_PROSE = (">>>", "...", "|", "+-", "==", "--", "**", "~~", "^^", "#")
_CODE = re.compile(r"(?:def|class|async|import|from|with|for|while|if|try|return|print) .*[^.]$", re.DOTALL)
_BLANK_LINE = re.compile(r"\n\s*\n")
_HTML_PARAGRAPH = re.compile(r"<(p|dd)(?:\s[^>]*)?>(.*?)</\1>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_R_STRINGS = 16  # SEXPTYPE STRSXP in R's serialisation


def _prose(texts: Iterator[str]) -> Iterator[SourceRow]:
    for text in map(tidy, texts):
        if is_prose(text, _SHORTEST):
            yield SourceRow("", text)


def rst_paragraphs(source: str) -> Iterator[str]:
    """Paragraphs and list items of a reStructuredText page that end like a sentence; tables and code are omitted."""
    for block in _RST_BLOCK.split(source):
        lines = [line.strip() for line in block.splitlines()]
        if any(line.startswith(_RST_NO_PROSE) for line in lines):
            continue
        text = " ".join(line for line in lines if not line.startswith(".."))
        text = _ROLE.sub(r"\1", text.removeprefix("* ").removeprefix("- ")).replace("``", "").replace("::", ":")
        if text[:1].isalpha() and text.rstrip(")").endswith((".", ":", "!", "?")) and not _CODE.match(text):
            yield text


def read_python(archives: list[Path]) -> Iterator[SourceRow]:
    """The manual of Python, from its sources."""
    for _, content in read_members(archives[0], "*/html/_sources/*.rst.txt"):
        yield from _prose(rst_paragraphs(content.decode("utf-8", errors="replace")))


def html_paragraphs(page: str) -> Iterator[str]:
    """Text of the <p> elements, and of <dd> elements that hold none."""
    for _, inner in _HTML_PARAGRAPH.findall(page):
        yield _TAG.sub("", inner.rpartition("<p>")[2])


def read_postgresql(archives: list[Path]) -> Iterator[SourceRow]:
    """The manual of PostgreSQL."""
    for _, content in read_members(archives[0], "*/html/*.html"):
        yield from _prose(html_paragraphs(content.decode("utf-8", errors="replace")))


def wordnet_glosses(lines: str) -> Iterator[str]:
    """`word: definition` of each synset (format: wndb(5WN))."""
    for line in lines.splitlines():
        if not line.startswith(" ") and " | " in line:
            fields, _, gloss = line.partition(" | ")
            yield f"{fields.split(' ')[4].split('(')[0].replace('_', ' ')}: {gloss.strip()}"


def read_wordnet(archives: list[Path]) -> Iterator[SourceRow]:
    """Definitions of WordNet."""
    for _, content in read_members(archives[0], "usr/share/wordnet/data.*"):
        yield from _prose(wordnet_glosses(content.decode("latin-1")))


def r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """Character vectors of an R lazy-load database: length-prefixed zlib blocks, each one an XDR-serialised vector."""
    at = 0
    while at + 4 < len(database):
        stream = zlib.decompressobj()
        block = stream.decompress(database[at + 4 :], MEMBER_BYTES)
        if not stream.eof:
            raise SoliError("a block of an R database is cut short or too large: delete the package from the cache")
        at = len(database) - len(stream.unused_data)
        encoding = struct.unpack_from(">i", block, 14)[0]  # after "X\n", three versions: the native encoding's name
        kind, count = struct.unpack_from(">Ii", block, 18 + encoding)
        if kind & 0xFF == _R_STRINGS:
            yield _r_strings(block, 26 + encoding, count)


def _r_strings(block: bytes, at: int, count: int) -> list[str]:
    strings = []
    for _ in range(count):
        length = max(0, struct.unpack_from(">Ii", block, at)[1])  # -1 is R's missing value
        strings.append(block[at + 8 : at + 8 + length].decode("utf-8", errors="replace"))
        at += 8 + length
    return strings


def read_austen(archives: list[Path]) -> Iterator[SourceRow]:
    """Jane Austen's six novels, by paragraph."""
    for _, content in read_members(archives[0], "*/data/Rdata.rdb"):
        for lines in r_character_vectors(content):
            yield from _prose(iter(_BLANK_LINE.split("\n".join(lines))))


def read_devil(archives: list[Path]) -> Iterator[SourceRow]:
    """Ambrose Bierce's Devil's Dictionary, by paragraph (an indented line begins one)."""
    for name, content in read_members(archives[0], "*/devil.dict.dz"):
        text = gunzip(content, name).decode("utf-8", errors="replace").partition("PREFACE")[2]
        yield from _prose(iter(re.split(r"\n\s*\n|\n(?= {4}\S)", text)))
