"""Tiny packages and files in the formats that sources read."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path


def wheel(path: Path, members: dict[str, bytes | str]) -> Path:
    """A zip archive; the readers go by paths inside, so it can replace any package."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def compiled_messages(messages: dict[str, str], order: str = "<") -> bytes:
    """A gettext .mo file without a hash table."""
    originals, translations, strings = b"", b"", b""
    start = 28 + 16 * len(messages)
    for english, chinese in sorted(messages.items()):
        for text in (english, chinese):
            encoded = text.encode()
            entry = struct.pack(order + "II", len(encoded), start + len(strings))
            strings += encoded + b"\0"
            if text is english:
                originals += entry
            else:
                translations += entry
    count = len(messages)
    header = struct.pack(order + "7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, start + len(strings))
    return header + originals + translations + strings


def r_block(lines: list[str | None]) -> bytes:
    """One entry of an R lazy-load database: a character vector, XDR-serialised, compressed, its length in front."""
    body = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    body += struct.pack(">Ii", 16, len(lines))
    for line in lines:
        encoded = b"" if line is None else line.encode()
        body += struct.pack(">Ii", 0x40009, -1 if line is None else len(encoded)) + encoded
    return struct.pack(">I", len(body)) + zlib.compress(body)


def bible_module(verses: dict[int, str]) -> str:
    """A generated pythonbible module: offsets count the source text, escapes included."""
    text, starts, ends = "", {}, {}
    for number, verse in verses.items():
        starts[number] = len(text)
        text += verse
        ends[number] = len(text)
    return f'from x import Bible\n\nbible = Bible(\n    V.X,\n    """{text}""",\n    {starts},\n    {ends},\n)\n'
