"""Runs every `$ soli ...` at the head of a fenced block in the given Markdown files and writes its output below it.

    python tools/refresh_outputs.py docs/seeing.md [--model FOLDER]

So that what the pages show is what the bundled model does. A block is refreshed whole; one that ends in a line `...`
keeps its length.
`--model` runs another folder in the place of the bundled model.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

WIDTH = "112"
BLOCK = re.compile(r"```\n\$ (?P<command>soli [^\n]*)\n(?P<output>.*?)```", re.DOTALL)


def output(command: str, model: str | None) -> str:
    """What a command prints, as plain text WIDTH columns wide; its failure ends the run."""
    arguments = shlex.split(command)[1:] + (["--model", model] if model else [])
    environment = os.environ | {"COLUMNS": WIDTH}
    process = subprocess.run(
        [sys.executable, "-m", "soli", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        sys.exit(f"{command}: {process.stderr.strip()}")
    return "".join(line.rstrip() + "\n" for line in process.stdout.rstrip("\n").splitlines())


def refreshed(block: re.Match[str], model: str | None) -> str:
    """The block with fresh output."""
    old_lines = block["output"].splitlines()
    lines = output(block["command"], model).splitlines()
    if "..." in old_lines:
        lines = [*lines[: old_lines.index("...")], "..."]
    return "\n".join(["```", f"$ {block['command']}", *lines, "```"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    for page in arguments.pages:
        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(lambda block: refreshed(block, arguments.model), text), encoding="utf-8")


if __name__ == "__main__":
    main()
