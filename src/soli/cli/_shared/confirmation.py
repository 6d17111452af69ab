"""The question before something costly or final."""

import sys

import typer

from soli.errors import SoliError


def confirm(question: str) -> None:
    """Ends the command unless a person answers yes: with status 1 after a no, with 2 where nobody can be asked."""
    if not sys.stdin.isatty():
        print(f"soli: {question} there is no terminal to ask on: give --yes", file=sys.stderr)
        raise typer.Exit(2)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise SoliError("nothing was done, for want of a yes")
