"""The notebook of examples/ runs from its first cell to its last, and shows what its stored outputs show."""

import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
sys.path.append(str(ROOT / "tools"))

import run_notebook  # noqa: E402


def output_forms(notebook: nbformat.NotebookNode) -> list[list[list[str]]]:
    """Per cell and output, its media types or the stream's name."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[sorted(output.get("data", [output.get("name", "")])) for output in cell.outputs] for cell in cells]


def test_it_runs_and_its_stored_outputs_have_the_same_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    fresh = run_notebook.executed(NOTEBOOK)
    assert output_forms(fresh) == output_forms(stored)
    sources = [cell.source for cell in fresh.cells]
    assert sources == [cell.source for cell in stored.cells]
    texts = "".join(output.get("text", "") for cell in fresh.cells for output in cell.get("outputs", []))
    assert "did you mean max_tokens?" in texts
