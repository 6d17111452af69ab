"""Folders of other programs' formats: each weight against its definition in float64, and every verb."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soli.checkpoint import load_model, open_checkpoint, save_model
from soli.checkpoint.convert import convert_checkpoint
from soli.checkpoint.quantization import parse_quantization
from soli.checkpoint.writer import Target
from soli.cli import main
from soli.config import load_config
from soli.errors import SoliError
from soli.experts.sources import sources_of
from soli.formats.quantized import CODECS, FP8, INT4, INT8
from soli.kernels.cpu import native
from soli.model import Transformer
from soli.plan.sizes import published_formats, sizes_as_published, sizes_of
from tests.checkpoint import published
from tests.checkpoint.folders import all_tensors, edit_json, edit_tensors, full_model
from tests.checkpoint.kimi import make_kimi_k25
from tests.checkpoint.published import FORMATS, is_linear, is_routed

# Inputs that are multiples of 32, sides beyond one block of 128.
SIZES = {"hidden_size": 160, "intermediate_size": 64, "moe_intermediate_size": 64, "q_lora_rank": 32,
         "kv_lora_rank": 32, "num_attention_heads": 4, "v_head_dim": 24, "model_type": "kimi_k2"}  # fmt: skip
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
Reference = dict[str, Tensor]


def quantized_folder(
    folder: Path, format: str, chosen: Callable[[str], bool] = is_linear, config: Any = None, **changes: Any
) -> Reference:
    """A small model in a format, written with its published names; the values of the chosen weights in float64."""
    save_model(full_model(**(SIZES | changes)), folder, "bf16")
    quantize, quantization = FORMATS[format]
    reference: Reference = {}
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: reference.update(published.quantize_tensors(tensors, quantize, chosen)),
    )
    edit_json(folder / "config.json", lambda table: table.update(quantization_config=config or quantization))
    return reference


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model(IDS)


@pytest.mark.parametrize("format", FORMATS)
def test_every_weight_is_what_its_format_defines(format: str, tmp_path: Path) -> None:
    reference = quantized_folder(tmp_path / "m", format)
    checkpoint = open_checkpoint(tmp_path / "m")
    slots = {slot.name: slot for slot in checkpoint.slots if slot.name in reference}
    assert len(slots) == len(reference) > 20 and not checkpoint.notes
    for name, slot in slots.items():
        weight = checkpoint.quantized(slot)
        assert weight is not None
        for values in (checkpoint.values(slot, torch.float32), weight.dequantize(torch.float32)):
            torch.testing.assert_close(values.double(), reference[name], rtol=2e-7, atol=0)
        if format.startswith(("pack", "mxfp4")) or format.endswith("bf16 scales"):  # products of few bits are exact
            assert torch.equal(checkpoint.values(slot, torch.float32).double(), reference[name])


@pytest.mark.parametrize("format", FORMATS)
def test_loaded_models_compute_alike_dequantized_and_as_stored(format: str, tmp_path: Path) -> None:
    reference = quantized_folder(tmp_path / "m", format)
    dense = load_model(tmp_path / "m", dtype=torch.float32, quantized=False)
    experts = dense.layers[1].mlp.experts
    expected = reference["model.layers.1.mlp.experts.2.down_proj.weight"]
    torch.testing.assert_close(experts.down_proj[2].double(), expected, rtol=2e-7, atol=0)
    stored = load_model(tmp_path / "m", dtype=torch.float32, quantized=True)
    assert stored.layers[1].mlp.experts.quantized is not None
    assert stored.layers[1].self_attn.o_proj.quantized is not None
    torch.testing.assert_close(logits(stored), logits(dense), rtol=0, atol=2e-5)
    by_default = load_model(tmp_path / "m")
    assert (by_default.layers[1].mlp.experts.quantized is not None) == format.startswith("pack-quantized")
    assert by_default.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("format", FORMATS)
def test_they_convert_to_what_soli_writes(format: str, tmp_path: Path) -> None:
    reference = quantized_folder(tmp_path / "m", format)
    for to in ("bf16", "fp8", "int8", "int4"):
        convert_checkpoint(tmp_path / "m", tmp_path / to, Target(to))
        checkpoint = open_checkpoint(tmp_path / to)
        for slot in checkpoint.slots:
            if slot.name not in reference:
                continue
            values = checkpoint.values(slot, torch.float32)
            exact = reference[slot.name].float()
            if to == "bf16":
                assert torch.equal(values, exact.bfloat16().float()) or torch.equal(values, exact)
            elif (to == "fp8" and checkpoint_is_fp8_block(format)) or (to == "int4" and format.startswith("pack")):
                torch.testing.assert_close(values, exact, rtol=2e-7, atol=0)
            else:
                codec = {"fp8": FP8, "int8": INT8, "int4": INT4}[to]
                group = None if to == "fp8" else codec.fitting_group(slot.shape[1], codec.groups[0])
                error = (codec.quantize(exact, group).dequantize(torch.float32) - exact).abs().max()
                assert (values - exact).abs().max() <= 1.01 * error


def checkpoint_is_fp8_block(format: str) -> bool:
    return "channel" not in format and any(part in format for part in ("fp8", "FP8", "float-quantized"))


def test_int4_is_laid_out_anew_without_loss(tmp_path: Path) -> None:
    """As int4 and as stored, with scales that float16 does not have."""
    reference = quantized_folder(tmp_path / "m", "pack-quantized", is_routed, published.KIMI)
    scale = "model.layers.1.mlp.experts.0.up_proj.weight_scale"
    edit_tensors(tmp_path / "m" / "model.safetensors", lambda tensors: tensors[scale].mul_(2.0**-30))
    reference[scale.removesuffix("_scale")] *= 2.0**-30
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "int4"), "--to", "int4"]) == 0
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "pack"), "--to", "as-is", "--pack"]) == 0
    for folder in ("int4", "pack"):
        checkpoint = open_checkpoint(tmp_path / folder)
        for slot in checkpoint.slots:
            if slot.name in reference:
                assert checkpoint.entries[slot.name].dtype == "U8" and checkpoint.format(slot) == "int4_bf16"
                assert torch.equal(checkpoint.values(slot, torch.float32).double(), reference[slot.name])
    written, original = all_tensors(tmp_path / "pack"), all_tensors(tmp_path / "m")
    plain = [name for name in original if "experts" not in name]
    assert all(torch.equal(written[name], original[name]) for name in plain)
    described = json.loads((tmp_path / "pack" / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "soli" and described["bits"] == 4
    for folder in ("m", "pack"):
        assert torch.equal(logits(load_model(tmp_path / folder)), logits(load_model(tmp_path / "pack")))


@pytest.mark.parametrize("format", ["fp8 per tensor", "float-quantized in blocks", "modelopt FP8"])
def test_fp8_is_packed_in_blocks_without_loss(format: str, tmp_path: Path) -> None:
    reference = quantized_folder(tmp_path / "m", format)
    convert_checkpoint(tmp_path / "m", tmp_path / "pack", None, pack=True)
    checkpoint = open_checkpoint(tmp_path / "pack")
    assert checkpoint.config.quantization_config is not None
    assert checkpoint.config.quantization_config["weight_block_size"] == [128, 128]
    for slot in checkpoint.slots:
        if slot.name in reference:
            values = checkpoint.values(slot, torch.float32).double()
            torch.testing.assert_close(values, reference[slot.name], rtol=2e-7, atol=0)
    assert len(sources_of(checkpoint).layers) == 2


@pytest.mark.parametrize("format", ["float-quantized per channel", "modelopt NVFP4", "mxfp4"])
def test_a_pack_keeps_what_memory_has_as_the_files_do(format: str, tmp_path: Path) -> None:
    reference = quantized_folder(tmp_path / "m", format)
    if format == "modelopt NVFP4":  # announced in a file that a pack is without
        edit_json(tmp_path / "m" / "config.json", lambda config: config.pop("quantization_config"))
        text = json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}})
        (tmp_path / "m" / "hf_quant_config.json").write_text(text)
    for folder, target in (("pack", None), ("int8", Target("int8"))):
        convert_checkpoint(tmp_path / "m", tmp_path / folder, target, pack=True)
        checkpoint = open_checkpoint(tmp_path / folder)
        layers = sources_of(checkpoint).layers
        assert len(layers) == 2 and all(len(expert.reads) == 1 for expert in layers[0].experts)
        for slot in checkpoint.slots if target is None else ():
            if slot.name in reference:
                values = checkpoint.values(slot, torch.float32).double()
                torch.testing.assert_close(values, reference[slot.name], rtol=2e-7, atol=0)


@pytest.mark.parametrize("format", ["float-quantized per channel", "modelopt NVFP4"])
def test_a_pack_checks_the_scales_that_it_copies(format: str, tmp_path: Path) -> None:
    quantized_folder(tmp_path / "m", format)
    scale = "model.layers.1.mlp.experts.2.down_proj.weight_scale"

    def damage(tensors: dict[str, Tensor]) -> None:
        values = tensors[scale].float()
        values[0] = float("nan")
        tensors[scale] = values.to(tensors[scale].dtype)

    edit_tensors(tmp_path / "m" / "model.safetensors", damage)
    with pytest.raises(SoliError, match=rf"{re.escape(scale)}.*finite"):
        convert_checkpoint(tmp_path / "m", tmp_path / "pack", None, pack=True)


def test_a_pack_of_formats_of_which_one_is_rewritten_is_rejected(tmp_path: Path) -> None:
    quantized_folder(tmp_path / "m", "fp8 per tensor", lambda name: is_linear(name) and "o_proj" not in name)
    edit_tensors(
        tmp_path / "m" / "model.safetensors",
        lambda tensors: published.quantize_tensors(tensors, published.fp8_rows, lambda name: "o_proj" in name),
    )
    with pytest.raises(SoliError, match="give --to bf16, fp8, int8 or int4"):
        convert_checkpoint(tmp_path / "m", tmp_path / "pack", None, pack=True)
    convert_checkpoint(tmp_path / "m", tmp_path / "pack", Target("int8"), pack=True)
    assert len(sources_of(open_checkpoint(tmp_path / "pack")).layers) == 2


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_are_planned_from_the_configuration_as_they_are_stored(format: str, tmp_path: Path) -> None:
    quantized_folder(tmp_path / "m", format)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert sizes_of(checkpoint).parts == sizes_as_published(checkpoint.config).parts


def test_modules_of_mixed_precision_are_planned_each_as_listed(tmp_path: Path) -> None:
    """Before there are weights; modules that are not listed are not quantized."""
    layers = {"model.layers.1.mlp.experts": {"quant_algo": "NVFP4"}, "model.layers.1.self_attn.o_proj": "FP8"}
    mixed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    quantized_folder(tmp_path / "m", "modelopt NVFP4", is_routed, mixed)
    formats = published_formats(load_config(tmp_path / "m"))
    assert formats["routed experts"] == "nvfp4" and formats["attention"] == "fp8"
    assert formats["shared experts"] == formats["dense MLP"] == formats["embedding"] == "bf16"


def test_names_and_patterns_that_are_not_quantized_hold_plain_weights(tmp_path: Path) -> None:
    for at, ignore in enumerate((("model.layers.0.self_attn.o_proj",), (r"re:model\.layers\.0\.self_attn\.o_.*",))):
        folder = tmp_path / str(at)
        config = published.compressed_tensors("pack-quantized", ignore, **published.INT4)
        o_proj = "model.layers.0.self_attn.o_proj.weight"
        reference = quantized_folder(
            folder, "pack-quantized", lambda name, o_proj=o_proj: is_linear(name) and name != o_proj, config
        )
        model = load_model(folder)
        assert model.layers[0].self_attn.o_proj.quantized is None and o_proj not in reference
        assert model.layers[1].self_attn.o_proj.quantized is not None


def test_a_weight_that_is_quantized_where_the_configuration_says_it_is_not_is_named(tmp_path: Path) -> None:
    quantized_folder(tmp_path / "m", "pack-quantized", is_linear, published.KIMI)
    with pytest.raises(SoliError, match=r"self_attn\S* is packed int4, but quantization_config .* not quantized"):
        load_model(tmp_path / "m")


def test_groups_of_two_formats(tmp_path: Path) -> None:
    """Experts int4, attention FP8 per channel, named by pattern, as mixed-precision folders have them."""
    config = published.compressed_tensors("mixed-precision", targets=(r"re:.*\.experts\..*",), **published.INT4)
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    fp8 = published.compressed_tensors("x", **published.FLOAT8, strategy="channel")["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = fp8 | {"format": "float-quantized", "targets": ["Linear"]}
    reference = quantized_folder(tmp_path / "m", "pack-quantized", is_routed, config)

    def quantize_attention(tensors: dict[str, Tensor]) -> None:
        def is_attention(name: str) -> bool:
            return "self_attn" in name and is_linear(name)

        reference.update(published.quantize_tensors(tensors, published.fp8_rows, is_attention))

    edit_tensors(tmp_path / "m" / "model.safetensors", quantize_attention)
    checkpoint = open_checkpoint(tmp_path / "m")
    formats = {checkpoint.format(slot) for slot in checkpoint.slots if slot.name in reference}
    assert formats == {"int4_bf16", "fp8_row"}
    for slot in checkpoint.slots:
        if slot.name in reference:
            torch.testing.assert_close(
                checkpoint.values(slot, torch.float32).double(), reference[slot.name], rtol=2e-7, atol=0
            )


def test_modelopts_own_file_says_how_weights_are_quantized(tmp_path: Path) -> None:
    reference = quantized_folder(tmp_path / "m", "modelopt NVFP4")
    edit_json(tmp_path / "m" / "config.json", lambda config: config.pop("quantization_config"))
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    text = json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization})
    (tmp_path / "m" / "hf_quant_config.json").write_text(text)
    checkpoint = open_checkpoint(tmp_path / "m")
    convert_checkpoint(tmp_path / "m", tmp_path / "again", Target("bf16"))
    assert not (tmp_path / "again" / "hf_quant_config.json").exists()
    slot = next(slot for slot in checkpoint.slots if slot.name in reference)
    torch.testing.assert_close(
        checkpoint.values(slot, torch.float32).double(), reference[slot.name], rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("format", ["pack-quantized", "modelopt NVFP4", "float-quantized per channel"])
def test_a_quantized_head_is_read(format: str, tmp_path: Path) -> None:
    config = {**FORMATS[format][1], "ignore": []}
    reference = quantized_folder(
        tmp_path / "m", format, lambda name: is_linear(name) or name == "lm_head.weight", config,
        num_nextn_predict_layers=0,
    )
    dense = load_model(tmp_path / "m", dtype=torch.float32, quantized=False)
    torch.testing.assert_close(dense.lm_head.weight.double(), reference["lm_head.weight"], rtol=2e-7, atol=0)
    stored = load_model(tmp_path / "m", dtype=torch.float32, quantized=True)
    assert stored.lm_head.quantized is not None
    torch.testing.assert_close(logits(stored), logits(dense), rtol=0, atol=2e-5)


def test_nvfp4_of_kimi_k25_is_announced_for_the_whole_model(tmp_path: Path) -> None:
    reference = quantized_folder(tmp_path / "m", "modelopt NVFP4", num_nextn_predict_layers=0)
    quantization = FORMATS["modelopt NVFP4"][1]
    edit_json(tmp_path / "m" / "config.json", lambda config: config.pop("quantization_config"))
    make_kimi_k25(tmp_path / "m", "deepseek_v3", quantization_config=quantization)
    checkpoint = open_checkpoint(tmp_path / "m")
    slots = [slot for slot in checkpoint.slots if slot.name in reference]
    assert len(slots) == len(reference)
    for slot in slots:
        values = checkpoint.values(slot, torch.float32).double()
        torch.testing.assert_close(values, reference[slot.name], rtol=2e-7, atol=0)


def group(**changes: Any) -> dict[str, Any]:
    return published.compressed_tensors("pack-quantized", **(published.INT4 | changes))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": ["fp8"]}, "fp8"),
        ({"bits": 4}, "quant_method"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        ({"quant_method": "fp8", "weight_block_size": [1, 128]}, r"\[1, 128\]"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "X8"}}},
         "X8"),
        (group(symmetric=False), "symmetric"),
        (group(actorder="group"), "actorder"),
        (group(strategy="channel", group_size=None), "strategy 'channel'"),
        (group(group_size=16), "group_size 16"),
        (group(num_bits=8), "num_bits 8"),
        (group() | {"format": "marlin-24"}, "marlin-24"),
        (group() | {"format": "int-quantized"}, "int-quantized"),
        (group() | {"config_groups": {"W4A16": ["Linear"]}}, "W4A16"),
        (group() | {"config_groups": None}, "config_groups"),
        (group() | {"ignore": "lm_head"}, "ignore"),
        (group() | {"ignore": ["re:*("]}, "ignore"),
        (group() | {"quantization_status": "frozen"}, "frozen"),
        (group() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (group() | {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transform_config"),
        (published.compressed_tensors("nvfp4-pack-quantized", **published.FLOAT4, strategy="tensor_group",
                                      group_size=32), "group_size 32"),
        (published.compressed_tensors("mxfp8-quantized", **published.FLOAT8, strategy="group", group_size=32),
         "mxfp8-quantized"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named_in_one_sentence(config: dict[str, Any], named: str, tmp_path: Path, capsys) -> None:
    quantized_folder(tmp_path / "m", "pack-quantized", is_routed, config)
    with pytest.raises(SoliError, match=named) as caught:
        open_checkpoint(tmp_path / "m")
    assert "config.json: quantization_config" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        group(symmetric=None, actorder=False),
        group() | {"transform_config": {"config_groups": {}}, "sparsity_config": {"format": None, "ignore": []}},
        {"quant_method": "fp8", "weight_block_size": [], "fmt": ""},
    ],
)
def test_neutral_values_are_none(config: dict[str, Any]) -> None:
    assert parse_quantization(config).layouts


SCALE = "model.layers.1.mlp.experts.2.down_proj.weight_scale"
PACKED = "model.layers.1.mlp.experts.2.down_proj.weight_packed"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scale": (lambda held: held.pop(SCALE), "missing"),
    "no shape": (lambda held: held.pop(SCALE.replace("scale", "shape")), "missing"),
    "no values": (lambda held: held.pop(PACKED), "weight of shape.*missing"),
    "zero points": (lambda held: held.update({SCALE.replace("scale", "zero_point"): torch.zeros(1)}), "zero_point"),
    "order of groups": (lambda held: held.update({SCALE.replace("scale", "g_idx"): torch.zeros(1)}), "g_idx"),
    "both": (lambda held: held.update({PACKED.removesuffix("_packed"): torch.zeros(160, 64)}), "is a scale"),
    "scales of another dtype": (lambda held: held.update({SCALE: held[SCALE].double()}), "F64"),
    "scales of another group": (lambda held: held.update({SCALE: held[SCALE][:, :1].clone()}), r"\(160, 1\)"),
    "values of another width": (lambda held: held.update({PACKED: held[PACKED][:, :4].clone()}), r"\(160, 4\)"),
    "a shape of another": (lambda held: held[SCALE.replace("scale", "shape")].fill_(7), r"weight_shape is \(7, 7\)"),
    "scales that are no numbers": (lambda held: held[SCALE].fill_(float("nan")), "finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named(damage: str, tmp_path: Path) -> None:
    quantized_folder(tmp_path / "m", "pack-quantized", is_routed, published.KIMI)
    edit, named = DAMAGES[damage]
    edit_tensors(tmp_path / "m" / "model.safetensors", edit)
    with pytest.raises(SoliError, match=rf"experts\.2\.down_proj.*{named}|{named}.*experts\.2\.down_proj"):
        load_model(tmp_path / "m")


def test_the_kernels_read_every_format() -> None:
    assert CODECS.keys() == native.FORMATS.keys()


def test_warnings_are_not_given_for_activations_scales(tmp_path: Path) -> None:
    quantized_folder(tmp_path / "m", "fp8 per tensor, static")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tmp_path / "m")
