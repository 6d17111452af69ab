"""Tab-separated files that Soli itself writes: no header, no quotes, the same number of columns in every row."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from soli.errors import SoliError
from soli.input_files import decode, read_lines


def write_tsv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write rows of text without tabs and line breaks; the file is renamed into place when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines("\t".join(row) + "\n" for row in rows)
    partial.replace(path)


def read_tsv(path: Path, columns: int) -> Iterator[list[str]]:
    """Rows of a file with that many columns; SoliError names the first line that has another number."""
    for number, line in read_lines(path):
        row = decode(line, f"{path}, line {number}").rstrip("\n").split("\t")
        if len(row) != columns:
            raise SoliError(f"{path}:{number} has {len(row)} columns, not {columns}: delete the file and build again")
        yield row
