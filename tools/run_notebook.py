"""Runs a notebook and writes it back with its outputs, without times and other metadata of the run.

    python tools/run_notebook.py examples/first_steps.ipynb
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SECONDS = 300  # for one cell


def executed(file: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; nbclient.exceptions.CellExecutionError for a cell that fails."""
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False).execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    return notebook


def main() -> None:
    for name in sys.argv[1:]:
        notebook = executed(Path(name))
        nbformat.validate(notebook)
        nbformat.write(notebook, Path(name))


if __name__ == "__main__":
    main()
