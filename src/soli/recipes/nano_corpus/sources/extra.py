"""Pairs from a person's own files, given to `soli data build --extra FILE`: tab-separated source, Chinese, English."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from soli.errors import SoliError
from soli.recipes.nano_corpus.sources.row import SourceRow

PUBLIC: Final = ("tatoeba-gh", "python-docs-gh", "xquad-gh")
"""Sources that public repositories have and no package index: recipes may weigh them, an extra file brings them."""


def read_extra(files: Iterable[Path]) -> Iterator[tuple[str, SourceRow]]:
    """(source, pair) of every line of the files, which may be compressed with xz.

    SoliError for a file that cannot be read and for the first line without exactly three columns.
    """
    for file in files:
        opener = lzma.open if file.suffix == ".xz" else open
        try:
            with opener(file, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    columns = line.rstrip("\n").split("\t")
                    if len(columns) != 3 or not columns[0]:
                        raise SoliError(
                            f"{file}:{number} has {len(columns)} columns: write source, Chinese, English between tabs"
                        )
                    source, zh, en = columns
                    yield source, SourceRow(zh, en)
        except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
            raise SoliError(f"{file} cannot be read as UTF-8 text ({error}): give a TSV file, or one in .xz") from error
