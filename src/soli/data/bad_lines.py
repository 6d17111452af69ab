"""What becomes of bad lines: each is listed and counted, the first of each file are told, too many are an error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from soli.data.readers import BLANK, BadLine, Entry, Layout, files_of, read_file
from soli.errors import SoliError

SHOWN = 5
"""Bad lines of a file that are told at once."""


class BadLines:
    """Every bad line as a row of a JSONL file, counted by file; `tell` takes a line of text for each one to show."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._path, self._tell = path, tell

    def __enter__(self) -> BadLines:
        self._out = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        for name, count in self.counts.items():
            if count > SHOWN:
                self._tell(f"{name}: {count - SHOWN:,} more bad lines")

    def add(self, file: Path, bad: BadLine) -> None:
        name = str(file)
        self.counts[name] += 1
        row = {"file": name, "line": bad.line, "why": bad.why, "excerpt": bad.excerpt}
        self._out.write(json.dumps(row) + "\n")  # ASCII: an excerpt may hold what is not Unicode
        if self.counts[name] <= SHOWN:
            self._tell(f"{name}:{bad.line}: {bad.why}")


def good_entries(path: Path, layout: Layout, bad: BadLines) -> Iterator[Entry]:
    """Entries of an input's files in order, its bad lines put aside.

    SoliError when more than half of a file's lines are bad (of an input's files, where each is one document). Blank
    lines do not count towards that half.
    """
    form, files = files_of(path, layout)
    one_document_each = form == "text" and not layout.lines
    for group in [files] if one_document_each else [[file] for file in files]:
        lines = faults = 0
        for file in group:
            for row in read_file(file, form, layout):
                lines += 1
                if isinstance(row, BadLine):
                    faults += row.why != BLANK
                    bad.add(file, row)
                else:
                    yield row
        if 2 * faults > lines:
            name = path if one_document_each else group[0]
            raise SoliError(
                f"{name}: {faults:,} of {lines:,} {'files' if one_document_each else 'lines'} are bad, more than half: "
                "see that --field, --pair and --format fit the file"
            )
