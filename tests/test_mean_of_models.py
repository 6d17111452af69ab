"""The example that averages two models."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "mean_of_models.py")


def folder(path: Path, weight: torch.Tensor) -> Path:
    path.mkdir()
    save_file({"w": weight}, path / "model.safetensors")
    (path / "config.json").write_text(f'{{"name": "{path.name}"}}')
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [EXAMPLE, *map(str, arguments)])
    runpy.run_path(EXAMPLE, run_name="__main__")


def test_each_weight_is_the_mean_by_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = folder(tmp_path / "one", torch.tensor([0.0, 4.0]))
    two = folder(tmp_path / "two", torch.tensor([8.0, 8.0]))
    run(monkeypatch, one, two, tmp_path / "mean", "--share", "0.25")
    assert load_file(tmp_path / "mean" / "model.safetensors")["w"].tolist() == [6.0, 7.0]
    assert (tmp_path / "mean" / "config.json").read_text() == '{"name": "two"}'


@pytest.mark.parametrize(
    ("weight", "share", "message"),
    [
        (torch.zeros(3), "0.5", "differ in shape"),
        (torch.zeros(2, dtype=torch.bfloat16), "0.5", "differ in shape or are not float32"),
        (torch.zeros(2), "1.5", "--share 1.5 is no share"),
    ],
)
def test_what_has_no_mean_is_one_sentence(
    weight: torch.Tensor, share: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = folder(tmp_path / "one", torch.zeros(2)), folder(tmp_path / "two", weight)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, one, two, tmp_path / "mean", "--share", share)
    assert not (tmp_path / "mean").exists()
    with pytest.raises(SystemExit, match=r"cannot be read .*: give folders that soli export"):
        run(monkeypatch, tmp_path / "none", one, tmp_path / "mean")
    (two / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SystemExit, match=r"cannot be read .*: give folders that soli export"):
        run(monkeypatch, one, two, tmp_path / "mean")
    with pytest.raises(SystemExit, match="exists: choose another folder"):
        run(monkeypatch, one, one, two)
