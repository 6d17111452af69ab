"""Reject the words of words.txt in code, tests and documents, and say what to write in their place.

    python tools/lint_words.py              exit with 1 when a rejected word occurs
    python tools/lint_words.py PATH ...     only these files and folders

The page (src/soli/serve/page) has words of its own; the changelog names old ones.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORDS = Path(__file__).with_name("words.txt")
PLACES = ("src", "tests", "benchmarks", "docs", "examples", "tools", "README.md", "CONTRIBUTING.md", "Makefile")
PYTHON, CPP, PROSE = {".py"}, {".cpp", ".h"}, {".md", ".toml"}
EXEMPT = ("src/soli/serve/page/", "tests/fixtures/", "tools/words.txt")
EXCEPTION = re.compile(r"(#|//) old name\b")
COMMENT_BREAK = r"\s+(?:(?:#|//|\*|>)\s*)?"  # between the words of a phrase: spaces, a line break, a comment's start


class Word(NamedTuple):
    kind: str
    text: str
    instead: str


class Finding(NamedTuple):
    path: Path
    line: int
    word: Word

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word.text} -> {self.word.instead}"


def load_words(path: Path = WORDS) -> list[Word]:
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            kind, rest = line.split(" ", 1)
            text, instead = rest.split(" -> ")
            if kind not in ("value", "name", "phrase"):
                raise SystemExit(f"{path}: {line}: the kind is value, name or phrase")
            words.append(Word(kind, text.strip(), instead.strip()))
    return words


def files(places: list[Path]) -> Iterator[Path]:
    for place in places:
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
            checked = path.suffix in PYTHON | CPP | PROSE or path.name == "Makefile"
            if path.is_file() and checked and not name.startswith(EXEMPT) and "__pycache__" not in path.parts:
                yield path


def value_names(path: Path, text: str) -> Iterator[tuple[str, int]]:
    """Names of variables and parameters, each with its line."""
    if path.suffix in PYTHON:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id, node.lineno
            elif isinstance(node, ast.arg):
                yield node.arg, node.lineno
    elif path.suffix in CPP:
        for number, line in enumerate(text.splitlines(), 1):
            for match in re.finditer(r"[\w>*&] +[*&]*([A-Za-z]\w*)(\[\w*\])* *(=[^=]|;|,|\)|\{)", line):
                yield match[1], number


def check(path: Path, text: str, words: list[Word]) -> list[Finding]:
    lines = text.splitlines()
    findings = []
    values = {word.text: word for word in words if word.kind == "value"}
    for name, number in value_names(path, text):
        if name in values:
            findings.append(Finding(path, number, values[name]))
    for word in words:
        if word.kind == "value":
            continue
        pattern, flags = rf"(?<![\w]){re.escape(word.text)}(?![\w])", 0
        if word.kind == "phrase":
            parts = (re.escape(part) for part in word.text.split())
            pattern, flags = rf"(?<!\w){COMMENT_BREAK.join(parts)}(?!\w)", re.IGNORECASE
        for match in re.finditer(pattern, text, flags):
            findings.append(Finding(path, text.count("\n", 0, match.start()) + 1, word))
    return sorted(finding for finding in findings if not EXCEPTION.search(lines[finding.line - 1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("places", nargs="*", type=Path)
    arguments = parser.parse_args()
    places = [place.resolve() for place in arguments.places] or [ROOT / place for place in PLACES]
    words = load_words()
    findings = []
    for path in files([place for place in places if place.exists()]):
        findings += check(path, path.read_text(encoding="utf-8"), words)
    for finding in findings:
        print(finding._replace(path=finding.path.relative_to(ROOT)), file=sys.stderr)
    if findings:
        print(f"{len(findings)} words to replace; tools/words.txt says why and with what", file=sys.stderr)
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
