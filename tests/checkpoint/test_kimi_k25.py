"""Kimi K2.5's folders: the text model of a model of images and text, in every verb."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soli.checkpoint import load_model, open_checkpoint, save_model
from soli.checkpoint.convert import convert_checkpoint
from soli.checkpoint.writer import Target
from soli.cli import main
from soli.config import ModelConfig, load_config
from soli.errors import SoliError
from tests.checkpoint.folders import all_tensors, edit_json, edit_tensors, full_model
from tests.checkpoint.kimi import WHOLE, make_kimi_k25, name_in_transformers, published_name
from tests.checkpoint.test_variants import stack_experts

IDS_BT = torch.arange(60).view(3, 20)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The text model in a folder of its own."""
    save_model(full_model(model_type="kimi_k2", num_nextn_predict_layers=0), tmp_path / "plain", "bf16")
    return tmp_path / "plain"


@pytest.mark.parametrize("text_model_type", ["kimi_k2", "deepseek_v3"])
@pytest.mark.parametrize("rename", [published_name, name_in_transformers])
def test_the_text_model_is_read(plain: Path, text_model_type: str, rename: Callable[[str], str]) -> None:
    expected = load_model(plain)
    make_kimi_k25(plain, text_model_type, rename)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_model(plain)
    assert [str(one.message) for one in caught] == [
        f"{plain}: 3 tensors of images are left out: the model is used for text alone"
    ]
    assert model.config.model_type == text_model_type
    with torch.no_grad():
        assert torch.equal(model(IDS_BT), expected(IDS_BT))


def test_stacked_experts_are_read_below_a_prefix(plain: Path) -> None:
    expected = load_model(plain)
    edit_tensors(plain / "model.safetensors", stack_experts)
    make_kimi_k25(plain, rename=name_in_transformers)
    with pytest.warns(UserWarning, match="tensors of images"):
        model = load_model(plain)
    with torch.no_grad():
        assert torch.equal(model(IDS_BT), expected(IDS_BT))


def test_what_is_written_is_a_text_model(plain: Path, tmp_path: Path) -> None:
    expected = all_tensors(plain)
    make_kimi_k25(plain)
    conversion = convert_checkpoint(plain, tmp_path / "again", Target("bf16"))
    assert any("tensors of images are left out" in note for note in conversion.notes)
    written = all_tensors(tmp_path / "again")
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model_type"] == "kimi_k2" and config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert not {"text_config", "vision_config"} & config.keys()


def test_count_reads_the_text_model(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", str(plain), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    make_kimi_k25(plain)
    assert main(["count", str(plain), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_the_whole_models_fields_fill_those_that_the_text_model_lacks(plain: Path) -> None:
    make_kimi_k25(plain, bos_token_id=5, eos_token_id=7, quantization_config={"quant_method": "fp8"})

    def edit(config: dict) -> None:
        config["text_config"] |= {"bos_token_id": None, "eos_token_id": 6, "tie_word_embeddings": True}

    edit_json(plain / "config.json", edit)
    config = load_config(plain)
    assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (5, 6, False)
    assert config.quantization_config == {"quant_method": "fp8"}


@pytest.mark.parametrize("text", [None, [], {"model_type": "kimi_k25"}, {"model_type": "qwen3"}])
def test_a_text_configuration_that_is_none_is_named(text: object) -> None:
    with pytest.raises(SoliError, match=r"text_config|qwen3"):
        ModelConfig.from_dict(WHOLE | {"text_config": text})


def test_a_tensor_that_is_there_twice_is_named(plain: Path) -> None:
    make_kimi_k25(plain)
    name = "model.norm.weight"
    edit_tensors(plain / "model.safetensors", lambda tensors: tensors.update({name: tensors[published_name(name)] + 1}))
    with pytest.raises(SoliError, match=r"model\.norm\.weight.*the same tensor"):
        open_checkpoint(plain)
