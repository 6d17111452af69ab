"""Soli and the safetensors library read back what Soli writes: every format, sharded or not, ragged sides, MTP."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import soli
from soli.checkpoint import Checkpoint, load_model, save_model
from soli.checkpoint.name_map import Kind, slots
from soli.config import load_config
from soli.formats.fp8 import is_ue8m0
from soli.formats.quantized import FP8
from soli.model import Transformer
from tests.checkpoint.folders import INDEX, all_tensors, edit_json, edit_tensors, full_config, full_model, saved
from tests.model.oracle import draw_config, draw_v2_config, make_model

DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}


def expected(model: Transformer, format: str, ue8m0: bool = False) -> dict[str, torch.Tensor]:
    """The state that comes back: rounded to the format, matrix by matrix, expert by expert; router biases untouched."""
    quantized = {slot.soli for slot in slots(model.config) if slot.kind is Kind.LINEAR}
    codec = replace(FP8, ue8m0=ue8m0)

    def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("e_score_correction_bias"):
            return tensor
        if format != "fp8" or name not in quantized:
            return tensor.to(DTYPE[format])
        if tensor.dim() == 2:
            return codec.quantize(tensor).dequantize()
        halves = 2 if name.endswith("gate_up_proj") else 1
        experts = [codec.quantize(rows).dequantize() for expert in tensor for rows in expert.chunk(halves)]
        return torch.stack(experts).view(tensor.shape)

    return {name: rounded(name, tensor.detach()) for name, tensor in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
@pytest.mark.parametrize("format, ue8m0", [("bf16", False), ("fp32", False), ("fp8", False), ("fp8", True)])
def test_save_then_load(format: str, shard_bytes: int, ue8m0: bool, tmp_path: Path) -> None:
    model = full_model()
    save_model(model, tmp_path / "m", format, ue8m0=ue8m0, shard_bytes=shard_bytes)
    assert (tmp_path / "m" / INDEX).exists() == (shard_bytes == 60_000)
    again = load_model(tmp_path / "m")
    assert again.config.quantization_config == load_config(tmp_path / "m").quantization_config
    assert same(dict(again.state_dict()), expected(model, format, ue8m0))
    assert not again.training and all(p.requires_grad for p in again.parameters())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), v2=st.booleans(), mtp=st.integers(0, 2), format=st.sampled_from(sorted(DTYPE)))
def test_any_configuration_round_trips(seed: int, v2: bool, mtp: int, format: str, tmp_path_factory) -> None:
    config = draw_v2_config(seed) if v2 else draw_config(seed, num_nextn_predict_layers=mtp)
    model = make_model(config)
    folder = tmp_path_factory.mktemp("any") / "m"
    save_model(model, folder, format, shard_bytes=100_000)
    again = load_model(folder)
    assert same(dict(again.state_dict()), expected(model, format))


def test_the_top_level_names_are_these() -> None:
    assert soli.load_model is load_model and soli.save_model is save_model


def test_fp32_logits_are_identical(tmp_path: Path) -> None:
    model = full_model()
    save_model(model, tmp_path / "m", "fp32")
    ids_BT = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m")(ids_BT), model(ids_BT))


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", format="fp8", shard_bytes=60_000)
    tensors = all_tensors(folder)
    checkpoint = Checkpoint(folder)
    assert tensors.keys() == checkpoint.entries.keys() == json.loads((folder / INDEX).read_text())["weight_map"].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), checkpoint.stored(name).view(torch.uint8)), name
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = {file: (folder / file).stat().st_size for file in index["weight_map"].values()}
    assert len(files) > 3 and max(files.values()) < 90_000  # no shard beyond 60 KB of data and its header


def test_fp8_files_have_the_official_layout(tmp_path: Path) -> None:
    tensors = all_tensors(saved(tmp_path / "m", format="fp8"))
    scaled = {name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")}
    assert scaled == {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert tensors["model.layers.1.mlp.experts.0.down_proj.weight_scale_inv"].shape == (2, 1)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight"):
        assert tensors[name].dtype == torch.bfloat16
    assert tensors["model.layers.2.eh_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
    }  # fmt: skip
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config


def test_ue8m0_scales_are_powers_of_two_and_config_says_so(tmp_path: Path) -> None:
    tensors = all_tensors(saved(tmp_path / "m", format="fp8", ue8m0=True))
    assert all(is_ue8m0(tensor) for name, tensor in tensors.items() if name.endswith("_scale_inv"))
    assert load_config(tmp_path / "m").quantization_config["scale_fmt"] == "ue8m0"


def test_scales_stored_as_e8m0_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", format="fp8", ue8m0=True)
    before = load_model(folder).state_dict()

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].to(torch.float8_e8m0fnu)

    edit_tensors(folder / "model.safetensors", narrow)
    assert same(dict(load_model(folder).state_dict()), dict(before))


def test_mtp_modules_carry_copies_unless_switched_off(tmp_path: Path) -> None:
    full, slim = all_tensors(saved(tmp_path / "a")), all_tensors(saved(tmp_path / "b", mtp_copies=False))
    copies = {"model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"}
    assert full.keys() - slim.keys() == copies
    assert torch.equal(full["model.layers.2.shared_head.head.weight"], full["lm_head.weight"])
    assert same(dict(load_model(tmp_path / "a").state_dict()), dict(load_model(tmp_path / "b").state_dict()))


def test_a_copy_that_differs_is_rejected_unless_mtp_is_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_tensors(folder / "model.safetensors", lambda t: t["model.layers.2.shared_head.head.weight"].add_(1))
    with pytest.raises(soli.SoliError, match=r"model\.safetensors: tensor model\.layers\.2\.shared_head\.head\.weight"):
        load_model(folder)
    assert len(load_model(folder, mtp=False).mtp) == 0


def test_a_folder_whose_mtp_was_dropped_loads_without_and_warns(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            del tensors[name]

    edit_tensors(folder / "model.safetensors", drop)
    with pytest.warns(UserWarning, match="holds no MTP module"):
        model = load_model(folder)
    assert len(model.mtp) == 0 and model.config.num_nextn_predict_layers == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say to who wants none
        load_model(folder, mtp=False)


def test_tied_embeddings(tmp_path: Path) -> None:
    model = full_model(tie_word_embeddings=True)
    save_model(model, tmp_path / "m", "fp32")
    assert "lm_head.weight" not in all_tensors(tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.lm_head.weight is again.embed_tokens.weight
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)


def test_a_router_bias_near_five_keeps_its_last_bit(tmp_path: Path) -> None:
    model = full_model()
    bias = torch.tensor([5.001, 5.002, 4.9999, 5.0])
    model.layers[1].mlp.gate.e_score_correction_bias.copy_(bias)
    save_model(model, tmp_path / "m", "fp8")
    assert torch.equal(load_model(tmp_path / "m").layers[1].mlp.gate.e_score_correction_bias, bias)
    assert load_model(tmp_path / "m", dtype=torch.float16).layers[1].mlp.gate.e_score_correction_bias.equal(bias)


def test_unknown_config_fields_come_back_and_old_ones_do_not(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", format="fp8")
    edit_json(folder / "config.json", lambda config: config.update(dtype="bfloat16", my_field={"a": 1}))
    save_model(load_model(folder), tmp_path / "b", "fp32")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["my_field"] == {"a": 1} and config["torch_dtype"] == "float32"
    assert "quantization_config" not in config and "dtype" not in config


def test_a_loaded_model_does_not_depend_on_its_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    model = load_model(folder)
    (folder / "model.safetensors").write_bytes(b"gone")
    with torch.no_grad():
        model.embed_tokens.weight.add_(1)
        assert model(torch.arange(5)[None]).isfinite().all()


def test_meta_builds_without_files() -> None:
    model = load_model("deepseek-v3", device="meta")
    assert sum(p.numel() for p in model.parameters()) > 671e9 and len(model.mtp) == 1
    assert len(load_model("deepseek-v3", device="meta", mtp=False).mtp) == 0
    assert full_config().num_nextn_predict_layers == 1
