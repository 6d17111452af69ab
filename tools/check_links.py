"""Check the documents: links, images, #anchors and files in code spans exist, and no line is over 120 characters.

    python tools/check_links.py

Tables, code blocks, formulas and lines with a link may be longer. Log and changelog may name files that are gone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
PAGES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "benchmarks/**/README.md",
    "src/soli/recipes/README.md",
)  # fmt: skip
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
IMAGE = re.compile(r"<img[^>]+src=\"([^\"]+)\"")
FILE = re.compile(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|toml|txt|sh|cpp|h|js|json))`")
PLACEHOLDER = re.compile(r"[A-Z]{2,}|^vendor/")
FOLDERS = ("", "src", "src/soli", "src/soli/kernels/cpu", "benchmarks", "docs")  # that a path may start from
HISTORY = ("CHANGELOG.md", "log.md")
FENCE = re.compile(r"^(```|~~~)")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines outside fenced code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line.strip()):
            fenced = not fenced
        elif not fenced:
            yield number, line


def anchor(heading: str) -> str:
    """A heading's anchor as GitHub makes it: lower case, punctuation left out, spaces to hyphens."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """All anchors of a page; a repeated heading gets -1, -2, ..."""
    counts: dict[str, int] = {}
    names = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for _, line in prose(text):
        if match := re.match(r"#{1,6} +(.+?) *#*$", line):
            name = anchor(match[1])
            number = counts.get(name, 0)
            counts[name] = number + 1
            names.add(f"{name}-{number}" if number else name)
    return names


def problems(page: Path) -> Iterator[str]:
    lines = dict(prose(page.read_text(encoding="utf-8")))
    name = page.relative_to(ROOT)
    text = "\n".join(lines.get(number, "") for number in range(1, max(lines, default=0) + 1))
    for match in [*LINK.finditer(text), *IMAGE.finditer(text)]:
        target, number = match[1], text.count("\n", 0, match.start()) + 1
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{name}:{number}: {target}: no such file"
        elif fragment and file.suffix == ".md" and fragment not in anchors(file.read_text(encoding="utf-8")):
            yield f"{name}:{number}: {target}: no such heading"
    for number, line in lines.items():
        for path in FILE.findall(line) if page.name not in HISTORY else ():
            if not PLACEHOLDER.search(path) and not any((ROOT / folder / path).exists() for folder in FOLDERS):
                yield f"{name}:{number}: {path}: no such file"
        if len(line) > WIDTH and not re.match(r"\s*\||\$\$|    ", line) and not LINK.search(line):
            yield f"{name}:{number}: {len(line)} characters, {WIDTH} are allowed"


def main() -> int:
    pages = sorted({page for pattern in PAGES for page in ROOT.glob(pattern)})
    complaints = [problem for page in pages for problem in problems(page)]
    print(*complaints, sep="\n", end="\n" if complaints else "", file=sys.stderr)
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
