"""Every GPU benchmark runs from start to end on a CPU, so that nothing breaks in the first minute on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from soli.data.recipe import load_recipe
from soli.data.tokenizer import Tokenizer
from soli.train.settings import read_settings

GPU = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"


def run(script: str, *arguments: object) -> str:
    process = subprocess.run(
        [sys.executable, GPU / script, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    """A folder as soli data build leaves it, of random tokens."""
    folder = tmp_path_factory.mktemp("data")
    Tokenizer.from_folder(Path(__file__).resolve().parent.parent / "src" / "soli" / "models" / "nano").save(folder)
    draw = np.random.default_rng(0)
    for split, count in (("train", 20_000), ("valid", 2_000)):
        draw.integers(3, 6000, count).astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "train_tokens": 20_000, "valid_tokens": 2_000}))
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="without --tiny they measure")
def test_without_a_gpu_nothing_is_measured(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(GPU))
    import chip

    chip.require_gpu(tiny=True)
    with pytest.raises(SystemExit, match="there is none"):
        chip.require_gpu(tiny=False)
    assert set(chip.ceilings(tiny=True)) == {"copy_gb_s", "bf16_tflops", "fp8_tflops"}


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="it would measure")
def test_two_gpus_are_needed_for_two() -> None:
    process = subprocess.run([sys.executable, GPU / "two_gpus.py"], capture_output=True, text=True, timeout=300)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "this compares two GPUs with one, and there are" in process.stderr


@pytest.mark.slow
def test_two_ranks_on_a_cpu_have_one_process_numbers() -> None:
    rows = json.loads(run("two_gpus.py", "--tiny"))["rows"]
    assert len(rows) == 3 and not any("failed" in row for row in rows)
    assert all(row["largest_difference"] < 1e-4 for row in rows) and rows[1]["bytes_sent_per_rank"] > 0


@pytest.mark.slow
def test_kernels_measure_what_a_cpu_has_and_say_what_it_lacks() -> None:
    rows = json.loads(run("kernels.py", "--tiny"))["rows"]
    assert "gb_s" in rows[0] and len(rows) == 7 and any("failed" in row for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["v3_layers.py", "train_speed.py"])
def test_every_row_of_what_a_cpu_can_do_is_there(script: str) -> None:
    rows = json.loads(run(script, "--tiny"))["rows"]
    assert rows and not any("failed" in row and "transformers" not in row["what"] for row in rows)


@pytest.mark.slow
def test_nano_goes_out_packed_and_comes_back_in_parts(packed: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "nano.tar.xz", tmp_path / "out"
    run("train_nano.py", "pack", packed, archive)
    train = ("train_nano.py", "train", archive, "--tiny", "--work", tmp_path / "work", "--out", out)
    first = run(*train, "--minutes", 0)
    assert '"ended": "time"' in first and '"steps": 1,' in first
    assert '"ended": "finished"' in run(*train)
    run("train_nano.py", "join", out, tmp_path / "models")
    assert all((tmp_path / "models" / which / "config.json").is_file() for which in ("best", "last"))
    (out / "model.tar.000").write_bytes(b"")
    with pytest.raises(AssertionError, match="fetch them again"):
        run("train_nano.py", "join", out, tmp_path / "again")


def test_a_fitted_schedule_has_its_turns_where_the_recipe_has_them(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(GPU))
    import train_nano

    before = read_settings(load_recipe("nano-gpu"))
    after = train_nano.lengthened(before, 50_000_000)
    assert after.total_tokens == 50_000_000
    assert after.schedule.warmup_tokens == before.schedule.warmup_tokens
    share = 50_000_000 / before.total_tokens
    for old, new in ((before.balance.gamma_tokens, after.balance.gamma_tokens),
                     (before.losses.mtp_late_after_tokens, after.losses.mtp_late_after_tokens)):  # fmt: skip
        assert old is not None and new == pytest.approx(share * old, rel=1e-6)


@pytest.mark.slow
def test_nano_s_speed_is_measured_by_batch(packed: Path, tmp_path: Path) -> None:
    archive = tmp_path / "nano.tar.xz"
    run("train_nano.py", "pack", packed, archive)
    rows = json.loads(run("nano_speed.py", archive, "--tiny", "--work", tmp_path / "work"))["rows"]
    assert len(rows) == 2 and all(row["tokens_s"] > 0 for row in rows)


@pytest.mark.slow
def test_an_ablation_leaves_its_line(packed: Path, tmp_path: Path) -> None:
    run("many_ablations.py", "--tiny", "--data", packed, "--out", tmp_path)
    assert '"arm": "baseline"' in (tmp_path / "gpu_ablations.jsonl").read_text()
