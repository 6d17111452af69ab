"""Bad lines of input files: each is listed and counted, the first of each file are printed, too many are an error."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from soli.data.entries import BLANK, BadLine, TextEntry
from soli.data.readers import InputLayout, files_of, read_file
from soli.errors import SoliError

PRINTED_PER_FILE = 5  # bad lines of a file that are printed as they are met


class BadLineLog:
    """Every bad line as a row of a JSONL file, counted by file; `print_line` prints the ones to show."""

    def __init__(self, path: Path, print_line: Callable[[str], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._path, self._print_line = path, print_line

    def __enter__(self) -> Self:
        self._out = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        for name, count in self.counts.items():
            if count > PRINTED_PER_FILE:
                self._print_line(f"{name}: {count - PRINTED_PER_FILE:,} more bad lines")

    def add(self, file: Path, bad: BadLine) -> None:
        name = str(file)
        self.counts[name] += 1
        row = {"file": name, "line": bad.line, "why": bad.reason, "excerpt": bad.excerpt}
        self._out.write(json.dumps(row) + "\n")  # ASCII: an excerpt may hold what is not Unicode
        if self.counts[name] <= PRINTED_PER_FILE:
            self._print_line(f"{name}:{bad.line}: {bad.reason}")


def usable_entries(path: Path, layout: InputLayout, log: BadLineLog) -> Iterator[TextEntry]:
    """Entries of an input's files in order, without its bad lines, which go to `log`.

    SoliError when more than half of a file's lines are bad (of an input's files, where each is one document). Blank
    lines do not count towards that half.
    """
    form, files = files_of(path, layout)
    document_per_file = form == "text" and not layout.lines
    for group in [files] if document_per_file else [[file] for file in files]:
        lines = faults = 0
        for file in group:
            for row in read_file(file, form, layout):
                lines += 1
                if isinstance(row, BadLine):
                    faults += row.reason != BLANK
                    log.add(file, row)
                else:
                    yield row
        if 2 * faults > lines:
            name = path if document_per_file else group[0]
            raise SoliError(
                f"{name}: {faults:,} of {lines:,} {'files' if document_per_file else 'lines'} are bad, more than half: "
                "check that --field, --pair and --format fit the file"
            )
