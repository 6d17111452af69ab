"""Out of a run's checkpoints, the best one or a mean of the latest."""

from pathlib import Path

import pytest
import torch

from soli.checkpoint import load_model
from soli.cli import main
from soli.errors import SoliError
from soli.train.checkpoints import export_run, load_run, load_weights
from soli.train.run_folder import checkpoints
from soli.train.setup import prepare
from soli.train.trainer import train
from tests.train.test_stages import extended
from tests.train.toy import settings, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Twelve steps, of which five checkpoints are kept."""
    folder = tmp_path_factory.mktemp("run")
    train(prepare(settings(run={"save_every": 2, "keep": 5}), {}, data, folder))
    return folder


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    model = tiny_model()
    load_weights(checkpoint, model)
    return model.state_dict()


def test_an_average_is_the_mean_of_the_latest_checkpoints(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "mean", "fp32", average=3)
    mean = load_model(tmp_path / "mean", dtype=torch.float32, mtp=True).state_dict()
    states = [state_of(checkpoint) for checkpoint in checkpoints(run)[-3:]]
    for name, last in states[-1].items():
        if name.startswith("mtp."):
            assert torch.equal(mean[name], last), name
            continue
        expected = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(mean[name], expected, rtol=1e-6, atol=1e-7)
        assert name.endswith("bias") or not torch.equal(mean[name], last), name
    assert "the mean of its checkpoints step-00000008 to step-00000012, 3 in number" in (
        tmp_path / "mean" / "README.md"
    ).read_text(encoding="utf-8")


def test_without_one_it_is_the_best_checkpoint(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "best"), "--to", "fp32"]) == 0
    best = load_model(tmp_path / "best", dtype=torch.float32, mtp=True).state_dict()
    assert all(torch.equal(best[name], tensor) for name, tensor in load_run(run).state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--average", "6"], "has 5 checkpoints, not 6; run.keep says"),
        (["--average", "2", "--tokenizer"], "leave one out"),
    ],
)
def test_what_cannot_be_averaged_is_rejected(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["export", str(run), str(tmp_path / "model"), *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "model").exists()


def test_checkpoints_of_an_earlier_phase_are_not_averaged(data: Path, tmp_path: Path) -> None:
    train(prepare(extended(run={"save_every": 1, "keep": 20}), {}, data, tmp_path / "run"))
    with pytest.raises(SoliError, match=r"has \d+ checkpoints of its latest phase, not 20"):
        export_run(tmp_path / "run", tmp_path / "model", "fp32", average=20)
    with pytest.raises(SoliError, match="0 checkpoints have no mean"):
        export_run(tmp_path / "run", tmp_path / "model", "fp32", average=0)
