"""Token ids and router biases that no model can use: rejected with file and field, or tensor, before any is used."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soli.checkpoint import load_model, save_model
from soli.cli import main
from soli.errors import SoliError
from tests.checkpoint.folders import edit_json, edit_tensors
from tests.train.toy import RECIPE, tiny_model, write_data

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
BAD_IDS = [-1, 288, 10**9, 10**40, True, 1.0, 1.5, "1", [], {}, [-1], [1, 288], [1, None], [True], [1.0], ["1"], [[1]]]
GOOD_IDS = [None, 0, 287, [1], [1, 2, 2]]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("intact")
    write_data(root / "data")
    save_model(tiny_model(), root / "model", tokenizer_from=root / "data")
    return root


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact / "model", tmp_path / "model")


def generate(folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    status = main(["generate", str(folder), "01", "--max-new-tokens", "2"])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("field", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("ids", BAD_IDS, ids=str)
def test_token_ids_outside_the_vocabulary_are_rejected(
    folder: Path, file: str, field: str, ids: Any, capsys: pytest.CaptureFixture
) -> None:
    if field == "pad_token_id" and ids == -1:
        pytest.skip("-1 says that there is none")
    (folder / "generation_config.json").write_text("{}")
    edit_json(folder / file, lambda table: table.update({field: ids}))
    status, error = generate(folder, capsys)
    assert status == 1 and str(folder / file) in error and field in error and error.count("\n") == 1


@pytest.mark.parametrize("ids", GOOD_IDS, ids=str)
def test_token_ids_of_the_vocabulary_are_read(folder: Path, ids: Any, capsys: pytest.CaptureFixture) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    edit_json(folder / "config.json", lambda table: table.update({"eos_token_id": ids}))
    assert generate(folder, capsys)[0] == 0


def test_a_pad_token_of_minus_one_is_none(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for file in ("config.json", "generation_config.json"):
        (folder / "generation_config.json").write_text("{}")
        edit_json(folder / file, lambda table: table.update({"pad_token_id": -1}))
        assert generate(folder, capsys)[0] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_router_biases_that_are_not_finite_are_rejected(folder: Path, value: float, tmp_path: Path) -> None:
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[BIAS].__setitem__(3, value))
    with pytest.raises(SoliError, match="not finite") as raised:
        load_model(folder)
    assert BIAS in str(raised.value) and "model.safetensors" in str(raised.value)
    assert main(["convert", str(folder), str(tmp_path / "converted"), "--to", "bf16"]) == 1
    assert not (tmp_path / "converted").exists()


def test_a_finite_router_bias_may_have_any_size(folder: Path) -> None:
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[BIAS].fill_(1e30))
    assert torch.isfinite(load_model(folder).layers[1].mlp.gate.e_score_correction_bias).all()


def test_packed_tokens_outside_the_vocabulary_are_rejected(
    intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = shutil.copytree(intact / "data", tmp_path / "data")
    np.memmap(data / "train.bin", "<u2", "r+")[:] = 40_000
    lines = [f'data.folder = "{data}"']
    for name, table in RECIPE.items():
        lines += [f"{name}.{key} = {json.dumps(value)}" for key, value in table.items()]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    assert main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "train.bin" in error and "40,000" in error and "unexpected" not in error
