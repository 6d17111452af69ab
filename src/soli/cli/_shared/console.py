"""What the command line prints: standard output has tables and results, standard error notes and progress."""

import dataclasses
import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Column

PIPE_WIDTH = 160  # columns when standard output is not a terminal and COLUMNS does not say


def stdout_console() -> Console:
    """Standard output without automatic highlighting: as wide as the terminal, or PIPE_WIDTH wide in a pipe."""
    is_pipe = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPE_WIDTH if is_pipe else None, highlight=False)


def stderr_console(quiet: bool = False) -> Console:
    """Standard error without automatic highlighting."""
    return Console(stderr=True, highlight=False, quiet=quiet)


def sanitize_for_terminal(text: str) -> str:
    """Text for standard output: without control characters but tab and newline on a terminal, unchanged in a pipe."""
    if not sys.stdout.isatty():
        return text
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def number_columns(*titles: str, no_wrap: bool = False) -> list[Column]:
    """Columns of a table of rich, aligned at the right."""
    return [Column(title, justify="right", no_wrap=no_wrap) for title in titles]


def print_json(value: Any, indent: int | None = None) -> None:
    """JSON, by default on one line, flushed at once; dataclasses field for field. Of what is not ASCII only bytes of
    file names that are not UTF-8 are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=dataclasses.asdict)
    print(text.encode("utf-8", "backslashreplace").decode(), flush=True)
