"""Configurations with 10^9 of something: counted by arithmetic, rejected in a sentence by whatever would build them."""

import json
import resource
import time
from pathlib import Path

import pytest

from soli.checkpoint import load_model, save_model
from soli.cli import main
from soli.config import ModelConfig, load_config
from soli.errors import SoliError
from soli.model import Transformer
from tests.checkpoint.folders import edit_json
from tests.train.toy import MODEL, RECIPE, tiny_model, write_data

HUGE = {
    "layers": {"num_hidden_layers": 10**9},
    "dense layers": {"num_hidden_layers": 10**9, "first_k_dense_replace": 10**9},
    "every seventh layer a mixture": {"num_hidden_layers": 10**9, "moe_layer_freq": 7},
    "experts": {"n_routed_experts": 10**9, "n_group": 1, "topk_group": 1},
    "experts in groups": {"n_routed_experts": 10**9, "n_group": 10**6, "topk_group": 10**6},
    "selected experts": {"n_routed_experts": 10**9, "num_experts_per_tok": 10**9, "n_group": 1, "topk_group": 1},
    "MTP modules": {"num_nextn_predict_layers": 10**9},
    "shared experts": {"n_shared_experts": 10**9},
    "hidden size": {"hidden_size": 10**9},
    "vocabulary": {"vocab_size": 10**9},
    "heads": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    "everything": {
        "num_hidden_layers": 2**62, "n_routed_experts": 2**62, "hidden_size": 2**62, "vocab_size": 2**62,
        "num_nextn_predict_layers": 2**62, "moe_intermediate_size": 2**62, "intermediate_size": 2**62,
    },
}  # fmt: skip
COUNT = ("count", "{}/model", "--mtp")
PLAN = ("train", "{}/recipe.toml", "--dry-run", "--no-measure")
GENERATE = ("generate", "{}/model", "1", "--max-new-tokens", "2")
CONVERT = ("convert", "{}/model", "{}/converted", "--to", "bf16")
TRAIN = ("train", "{}/recipe.toml", "--out", "{}/run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the data that the recipes train on."""
    root = tmp_path_factory.mktemp("huge")
    write_data(root / "data")
    save_model(tiny_model(), root / "model", tokenizer_from=root / "data")
    return root


@pytest.fixture
def damaged(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with the model's files and a recipe whose configuration has the changes of HUGE."""
    changes = HUGE[request.param]
    (tmp_path / "model").mkdir()
    for file in (folder / "model").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "model/config.json", lambda config: config.update(changes))
    sections = {**RECIPE, "model": {**MODEL, **changes}, "data": {"folder": str(folder / "data")}}
    lines = []
    for name, table in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("damaged", HUGE, indirect=True)
@pytest.mark.parametrize("command", (COUNT, PLAN, GENERATE, CONVERT, TRAIN), ids=lambda command: command[0])
def test_a_command_answers_in_one_sentence(
    damaged: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    status = main([part.replace("{}", str(damaged)) for part in command])
    seconds = time.process_time() - start
    errors = capsys.readouterr().err.splitlines()
    assert status == (0 if command in (COUNT, PLAN) else 1)
    assert len(errors) == status and "unexpected" not in "".join(errors), errors
    assert seconds < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert {file.name for file in damaged.iterdir()} == {"model", "recipe.toml"}  # nothing half written


@pytest.mark.parametrize("damaged", HUGE, indirect=True)
def test_a_model_without_weights_is_rejected_too(damaged: Path) -> None:
    start = time.process_time()
    config = load_config(damaged / "model")
    with pytest.raises(SoliError):
        Transformer(config)
    with pytest.raises(SoliError):
        load_model(damaged / "model")
    if config.num_hidden_layers + config.num_nextn_predict_layers > 100:
        with pytest.raises(SoliError, match=r"num_hidden_layers|num_nextn_predict_layers"):
            load_model(damaged / "model", "meta")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("case", [(9, 0, 1), (9, 3, 1), (9, 3, 2), (10, 4, 2), (9, 9, 1), (7, 1, 9)])
def test_layers_are_counted_as_they_are_built(case: tuple[int, int, int]) -> None:
    layers, first, step = case
    config = ModelConfig(num_hidden_layers=layers, first_k_dense_replace=first, moe_layer_freq=step)
    assert config.num_moe_layers == sum(map(config.is_moe_layer, range(layers)))
