"""Standard output for tables: coloured and as wide as the terminal, or plain and roomy in a pipe."""

import os
import sys

from rich.console import Console

PIPE_WIDTH = 160  # columns when standard output is not a terminal and COLUMNS does not say


def stdout_console() -> Console:
    """A console on standard output that highlights nothing by itself."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPE_WIDTH if piped else None, highlight=False)
