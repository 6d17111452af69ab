"""Folders of models with sparse attention: the published names and dtypes, full-size headers, round trips."""

import warnings
from pathlib import Path

import pytest
import torch

from soli.analysis.parameters import cache_bytes, cache_read_bytes, count, flops
from soli.checkpoint import load_model, save_model
from soli.checkpoint.gguf.metadata import check_config
from soli.checkpoint.load import open_checkpoint
from soli.checkpoint.name_map import slots
from soli.config import preset, replace
from soli.errors import SoliError
from soli.plan.inference import predict_decode, stated_machine
from soli.plan.inference_plan import divide
from soli.plan.sizes import published_format, sizes_in, sizes_of
from soli.train.settings import read_settings
from tests.checkpoint.folders import all_tensors, edit_tensors
from tests.checkpoint.headers import published_bf16, published_fp8, write_headers
from tests.model.oracle import draw_sparse_config, make_model, oracle_of

FULL_SIZE = {"deepseek-v3.2": published_fp8, "glm-5": published_bf16, "glm-5.2": published_bf16}
FAMILIES = ("deepseek_v32", "glm_moe_dsa")


@pytest.mark.parametrize(
    "name", ["deepseek-v3.2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm-5", "glm-5.2"))]
)
def test_a_full_size_folder_is_opened_counted_and_planned(name: str, tmp_path: Path) -> None:
    config = preset(name)
    write_headers(tmp_path / name, config, FULL_SIZE[name])
    checkpoint = open_checkpoint(tmp_path / name)
    assert checkpoint.config == config and not checkpoint.notes
    assert checkpoint.natural_dtype is torch.bfloat16
    stored, planned = sizes_of(checkpoint), sizes_in(config, published_format(config))
    assert stored.total_bytes == pytest.approx(planned.total_bytes, rel=1e-6)
    division = divide(stored, 256 * 10**9, 640)
    assert division.fits and division.least == 8
    machine = stated_machine(80e9, 7e9, None)
    assert predict_decode(stored, machine, division.share, 512, 0.2).tokens_per_second > 0


@pytest.mark.parametrize(
    ("name", "total", "activated"),
    [("glm-5", 744e9, 40.8e9), ("glm-5.2", 743.4e9, 40.3e9), ("deepseek-v3.2", 672e9, 37.5e9)],
)
def test_full_size_models_as_published(name: str, total: float, activated: float) -> None:
    counted = count(preset(name))
    assert counted.total == pytest.approx(total, rel=0.001)
    assert counted.activated - counted.embedding == pytest.approx(activated, rel=0.003)


def test_the_indexer_in_the_plan() -> None:
    v3, v32 = preset("deepseek-v3"), preset("deepseek-v3.2")
    assert cache_bytes(v32) - cache_bytes(v3) == 2 * 61 * 128
    assert cache_bytes(preset("glm-5.2"), mtp=True) == 2 * (79 * 576 + 22 * 128)
    for context in (1000, 2048):  # everything is selected, nothing scored
        assert flops(v32, context).attention_decode == flops(v3, context).attention_decode
        assert flops(v32, context).attention_prefill == flops(v3, context).attention_prefill
        assert cache_read_bytes(v32, context) == context * cache_bytes(v3)
    growth = flops(v32, 32768).attention_decode - flops(v32, 16384).attention_decode
    assert growth == 61 * 2 * 64 * 128 * 16384
    assert 8 * growth < flops(v3, 32768).attention_decode - flops(v3, 16384).attention_decode
    assert cache_read_bytes(v32, 32768) == 2 * 61 * (2048 * 576 + 32768 * 128)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8", "int8"])
def test_round_trip_with_an_mtp_module(family: str, format: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "q_lora_rank": 32, "index_head_dim": 32, "num_nextn_predict_layers": 1}
    model = make_model(draw_sparse_config(family, 1, **shape)).eval()
    save_model(model, tmp_path / "m", format)
    names = all_tensors(tmp_path / "m")
    prefix = f"model.layers.{model.config.num_hidden_layers}.self_attn.indexer."
    assert {f"{prefix}{tail}" for tail in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias")} <= names.keys()
    assert names[f"{prefix}weights_proj.weight"].is_floating_point()
    assert (f"{prefix}wq_b.weight_scale_inv" in names) == (format == "fp8")
    again = load_model(tmp_path / "m", dtype=torch.float32)
    assert again.config.indexer_types == model.config.indexer_types
    ids = torch.arange(30)[None]
    with torch.no_grad():
        if format == "fp32":
            assert torch.equal(again(ids), model(ids))
        assert again(ids).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_files_are_read_to_the_same_bits(family: str, tmp_path: Path) -> None:
    model = make_model(draw_sparse_config(family, 2)).eval()
    oracle_of(model).save_pretrained(tmp_path / "m")
    again = load_model(tmp_path / "m")
    ids = torch.arange(60).view(3, 20)
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_indexers_norm_and_weights_may_be_fp32_beside_fp8(dtype: torch.dtype, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "q_lora_rank": 32, "index_head_dim": 32}
    save_model(make_model(draw_sparse_config("deepseek_v32", 1, **shape)), tmp_path / "m", "fp8")
    expected = load_model(tmp_path / "m", dtype=dtype).state_dict()

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".k_norm." in name or ".weights_proj." in name:
                tensors[name] = tensors[name].float()

    edit_tensors(tmp_path / "m" / "model.safetensors", widen)
    widened = load_model(tmp_path / "m", dtype=dtype).state_dict()
    assert all(torch.equal(widened[name], tensor) for name, tensor in expected.items())


def test_a_shared_layer_has_no_indexer_and_a_full_one_must_have_it(tmp_path: Path) -> None:
    config = draw_sparse_config("glm_moe_dsa", 1, num_hidden_layers=3, indexer_types=["full", "shared", "full"])
    assert not [slot for slot in slots(config) if "layers.1.self_attn.indexer" in slot.name]
    save_model(make_model(config), tmp_path / "m", "fp32")
    edit_tensors(
        tmp_path / "m" / "model.safetensors", lambda tensors: tensors.pop("model.layers.2.self_attn.indexer.wk.weight")
    )
    with pytest.raises(SoliError, match=r"layers\.2\.self_attn\.indexer\.wk\.weight.* is missing"):
        load_model(tmp_path / "m")


def test_training_and_gguf_reject_sparse_attention_by_name() -> None:
    for model in ({"preset": "deepseek-v3.2"}, {"preset": "glm-5", "num_nextn_predict_layers": 0}):
        with pytest.raises(SoliError, match=r"model\.model_type is .*sparse attention cannot be trained"):
            read_settings({"model": model, "schedule": {"constant_tokens": 1000}})
    with pytest.raises(SoliError, match=r"index_topk is 2048, which llama\.cpp does not compute"):
        check_config(preset("deepseek-v3.2"))


def test_the_indexer_has_no_gradient() -> None:
    model = make_model(draw_sparse_config("deepseek_v32", 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.arange(40)[None]).square().mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if ".indexer." in name}


def test_a_preset_with_fewer_layers_keeps_its_pattern() -> None:
    fewer = replace(preset("glm-5.2"), {"num_hidden_layers": 8})
    assert fewer.indexer_types == ("full",) * 3 + ("shared",) * 3 + ("full", "shared")
    assert replace(preset("glm-5.2"), {"indexer_types": None}).num_indexers() == 78
    with pytest.raises(SoliError, match=r"indexer_types .* one item for each of 100 layers"):
        replace(preset("glm-5.2"), {"num_hidden_layers": 100})
