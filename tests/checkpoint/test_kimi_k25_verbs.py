"""A Kimi K2.5 folder as downloaded, small, through every verb: its experts packed int4 with bf16 scales."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from soli.checkpoint import load_model, save_model
from soli.cli import main
from soli.engine.request import EngineLimits
from soli.experts.load import load_paged_model
from soli.serve.server import ChatSettings, load
from soli.train.settings import read_settings
from tests.checkpoint import published
from tests.checkpoint.folders import all_tensors, edit_json, edit_tensors
from tests.checkpoint.kimi import make_kimi_k25
from tests.engine.tiny import tiny_model, tiny_tokenizer
from tests.experts.folders import SHAPE, K, answers, requests
from tests.kernels.weights import needs_kernels

NOTE = "3 tensors of images are left out: the model is used for text alone"
pytestmark = pytest.mark.filterwarnings("ignore:.*tensors of images are left out")
MODEL = SHAPE | {"model_type": "kimi_k2", "num_nextn_predict_layers": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kimi")
    tiny_tokenizer().save(root / "tokenizer")
    save_model(tiny_model("v3", **MODEL), root / "Kimi", tokenizer_from=root / "tokenizer")
    edit_tensors(
        root / "Kimi" / "model.safetensors",
        lambda tensors: published.quantize_tensors(tensors, published.pack_quantized, published.is_routed),
    )
    edit_json(root / "Kimi" / "config.json", lambda config: config.update(quantization_config=published.KIMI))
    return make_kimi_k25(root / "Kimi")


@pytest.fixture(autouse=True)
def no_progress(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TERM", "dumb")
    yield


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(folder), "the cat", "--max-new-tokens", "4", "--temperature", "0", "--json"]
    with pytest.warns(UserWarning, match=NOTE) as caught:
        assert main(arguments) == 0
    assert len(caught) == 1 and json.loads(capsys.readouterr().out)
    assert main([*arguments, "--dtype", "float32"]) == 0


def test_serve(folder: Path) -> None:
    loaded = load(str(folder), "cpu", "auto", EngineLimits(cache_bytes=2**22), chat=ChatSettings())
    assert loaded.text_model.model.config.model_type == "kimi_k2" and loaded.template_error is None


@needs_kernels
def test_the_cpp_kernels_compute_it_as_torch_does(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    experts = model.layers[1].mlp.experts.quantized
    assert experts is not None and {weight.format for weight in experts.downs} == {"int4_bf16"}
    prompts = requests((5, 20), 6)
    fused, eager = answers(model, prompts, "fused"), answers(model, prompts, "eager")
    dense = answers(load_model(folder, dtype=torch.float32, quantized=False), prompts, "eager")
    for one, two, three in zip(fused, eager, dense, strict=True):
        assert one[0] == two[0] == three[0]
        torch.testing.assert_close(torch.tensor(one[1]), torch.tensor(three[1]), rtol=0, atol=1e-4)


@needs_kernels
def test_its_experts_are_read_from_disk_with_the_same_bits_as_downloaded_and_repacked(
    folder: Path, tmp_path: Path
) -> None:
    assert main(["convert", str(folder), str(tmp_path / "pack"), "--to", "as-is", "--pack"]) == 0
    prompts = requests((5, 20), 6)
    for files in (folder, tmp_path / "pack"):
        paged, store = load_paged_model(files, K, poison=True)
        assert answers(paged, prompts) == answers(load_model(folder), prompts)
        store.close()


def test_with_a_limit_of_memory_it_answers_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(folder), "the cat", "--max-new-tokens", "6", "--temperature", "0"]
    outputs = []
    for memory in ([], ["--memory", "37MB"]):
        assert main([*arguments, *(memory or ["--dtype", "as-is"])]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_larger_than_memory_its_experts_are_read_from_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soli.engine.text_model.available_memory", lambda: 1000)
    with pytest.warns(UserWarning, match="more than is available, so its experts are read from disk as they are"):
        assert main(["generate", str(folder), "the cat", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("to", ["bf16", "fp8", "int8", "int4"])
def test_convert(folder: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), str(tmp_path / to), "--to", to]) == 0
    assert NOTE in capsys.readouterr().err
    assert not any("vision" in name or "language_model" in name for name in all_tensors(tmp_path / to))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tmp_path / to)


def test_train(folder: Path) -> None:
    """Every weight is a parameter with a gradient where it is asked for, and a recipe can have the folder's shape."""
    model = load_model(folder, dtype=torch.float32, quantized=False).train()
    ids = torch.arange(40).view(2, 20)
    torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    schedule = {"sequence_length": 64, "constant_tokens": 6400}
    settings = read_settings({"model": {"preset": str(folder), "num_hidden_layers": 3}, "schedule": schedule})
    assert settings.model.num_hidden_layers == 3 and settings.model.hidden_size == MODEL["hidden_size"]
