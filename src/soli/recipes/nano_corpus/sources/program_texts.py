"""Pairs from the texts of programs that keep them in forms of their own: JavaScript, docstrings, scripts of a game."""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from soli.recipes.nano_corpus.cleaning import Simplifier, align
from soli.recipes.nano_corpus.fetch import read_members
from soli.recipes.nano_corpus.sources.row import SourceRow, rows_by_key

_VSCODE_TEXT = re.compile(r"\blocalize2?\((\d+), (\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')")
_TYPESCRIPT_TEXT = re.compile(r"\bdiag\(\d+, \d[^,]*, \"(\w+)\", \"((?:[^\"\\]|\\.)*)\"")
_BLOCKLY_TEXT = re.compile(r"^Blockly\.Msg\[\"(\w+)\"\] = (\"(?:[^\"\\]|\\.)*\");$", re.MULTILINE)
_OBJECT_OPENS = re.compile(r"^\s*\"?([\w.-]+)\"?: [\[{]$|^const (\w+)(?:\$\d+)? = \{$")
_OBJECT_TEXT = re.compile(r"^\s*\"?([\w.-]+)\"?: (\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'),?$")
_RENPY_TEXT = re.compile(r"^\s+(?:# )?(?:(old|new) |\w+ )?\"((?:[^\"\\]|\\.)*)\"\s*$")


def read_hsk(archives: list[Path]) -> Iterator[SourceRow]:
    """Graded example sentences with their translations."""
    for _, content in read_members(archives[0], "*/data/sentences.json"):
        for entry in json.loads(content):
            yield SourceRow(entry["chinese"], entry["translation"].get("en", ""))


def read_vscode(archives: list[Path]) -> Iterator[SourceRow]:
    """Text number N of the language pack, and the English of `localize(N, "text")` in the sources."""
    chinese: list[str | None] = []
    for _, content in read_members(archives[0], "*/translations/main.i18n.json.js"):
        listing = content.decode("utf-8").split("=", 1)[1].rsplit("];", 1)[0] + "]"
        chinese = json.loads(listing.replace("\tundefined,", "\tnull,"))
    english: dict[int, str] = {}
    for _, content in read_members(archives[1], "*.js"):
        for number, literal in _VSCODE_TEXT.findall(content.decode("utf-8", errors="replace")):
            english[int(number)] = _literal(literal)
    for number, text in sorted(english.items()):
        zh = chinese[number] if number < len(chinese) else None
        yield from (SourceRow(*pair) for pair in align(zh or "", text))


def read_typescript(archives: list[Path]) -> Iterator[SourceRow]:
    """The compiler's messages: English beside each message's name in the program, Chinese by that name in a file."""
    english: dict[str, str] = {}
    chinese: dict[str, str] = {}
    for name, content in read_members(archives[0], "package/lib/*"):
        if name == "package/lib/typescript.js":
            english = {key: _literal(f'"{text}"') for key, text in _TYPESCRIPT_TEXT.findall(content.decode("utf-8"))}
        elif name == "package/lib/zh-cn/diagnosticMessages.generated.json":
            chinese = json.loads(content)
    yield from (SourceRow(text, english[key]) for key, text in chinese.items() if key in english)


def read_blockly(archives: list[Path]) -> Iterator[SourceRow]:
    """Blockly's messages."""
    texts: dict[str, dict[str, str]] = {}
    for name, content in read_members(archives[0], "package/msg/*.js"):
        if Path(name).stem in ("en", "zh-hans"):
            messages = _BLOCKLY_TEXT.findall(content.decode("utf-8"))
            texts[Path(name).stem] = {key: _literal(literal) for key, literal in messages}
    for key, text in texts.get("zh-hans", {}).items():
        yield SourceRow(text, texts.get("en", {}).get(key, ""))


def read_sheet_formulas(archives: list[Path]) -> Iterator[SourceRow]:
    """Descriptions of a spreadsheet's functions and parameters: nested objects with the same keys in both languages."""
    texts: dict[str, dict[tuple[str, ...], str]] = {}
    for name, content in read_members(archives[0], "package/lib/es/locale/*.js"):
        if Path(name).stem in ("en-US", "zh-CN"):
            texts[Path(name).stem] = dict(_object_texts(content.decode("utf-8")))
    return rows_by_key(texts.get("zh-CN", {}), texts.get("en-US", {}))


def _object_texts(script: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, text) of every string property, one a line, of the object literals of a generated script."""
    path: list[str] = []
    for line in script.splitlines():
        opens, text = _OBJECT_OPENS.match(line), _OBJECT_TEXT.match(line)
        if opens is not None:
            path = [*path, opens[1]] if opens[1] else []
        elif text is not None:
            yield (*path, text[1]), _literal(text[2])
        elif line.strip() in ("}", "},", "]", "],", "};"):
            path = path[:-1]


def read_renpy(archives: list[Path]) -> Iterator[SourceRow]:
    """A game engine's tutorial: each translated line stands below its English one, or after `old` and `new`."""
    for _, content in read_members(archives[0], "usr/share/games/renpy/demo/game/tl/schinese/*.rpy"):
        english = ""
        for line in content.decode("utf-8-sig").splitlines():
            match = _RENPY_TEXT.match(line)
            if match is None:
                continue
            text = re.sub(r"\{[^{}]*\}", "", match[2].replace('\\"', '"').replace("\\n", " "))
            if match[1] == "old" or line.lstrip().startswith("#"):
                english = text
            elif english:
                yield from (SourceRow(*pair) for pair in align(text, english))
                english = ""


def read_tencent(archives: list[Path]) -> Iterator[SourceRow]:
    """Docstrings of a cloud's Python library at the same class and property of its Chinese and its English edition."""
    chinese: dict[tuple[str, str], str] = {}
    english: dict[tuple[str, str], str] = {}
    for archive, texts in zip(archives, (chinese, english), strict=True):
        for name, content in read_members(archive, "tencentcloud/*/models.py"):
            for member, text in _docstrings(content.decode("utf-8")):
                texts[name, member] = text
    return rows_by_key(chinese, english)


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    for node in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for member in node.body:
            if not isinstance(member, ast.FunctionDef) or not member.decorator_list:
                continue
            text = (ast.get_docstring(member) or "").partition(":rtype:")[0]
            plain = re.sub(r"<[^<>]*>", "", html.unescape(text)).strip()
            if plain:
                yield f"{node.name}.{member.name}", " ".join(plain.split("\n")[0].split())


class _Paragraphs(HTMLParser):
    """The text of each paragraph of a page, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self._inside = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def read_debmake(archives: list[Path]) -> Iterator[SourceRow]:
    """Paragraphs in the same order of chapters that have as many of them in both languages."""
    pages: dict[tuple[str, str], list[str]] = {}
    for name, content in read_members(archives[0], "usr/share/doc/debmake-doc/html/*.html"):
        chapter, _, language = Path(name).stem.partition(".")
        if language in ("en", "zh-cn", "zh-tw"):
            parser = _Paragraphs()
            parser.feed(content.decode("utf-8"))
            pages[chapter, language] = [" ".join(text.split()) for text in parser.texts]
    for (chapter, language), texts in pages.items():
        english = pages.get((chapter, "en"), [])
        if language == "en" or len(texts) != len(english):
            continue
        simplify = Simplifier("tw2sp") if language == "zh-tw" else str
        for text, original in zip(texts, english, strict=True):
            yield from (SourceRow(simplify(zh), en) for zh, en in align(text, original))


def _literal(quoted: str) -> str:
    """The value of a JavaScript string literal whose escapes Python shares."""
    try:
        value = ast.literal_eval(quoted)
    except (SyntaxError, ValueError):
        return ""
    return value if isinstance(value, str) else ""
