"""int8 and int4 folders: written, described, mapped, computed with, converted back; and FP8 files used as stored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from soli.checkpoint import load_model, open_checkpoint, save_model
from soli.cli import main
from soli.errors import SoliError
from soli.formats.quantized import INT4, INT8
from soli.kernels import QuantizedExperts, QuantizedWeight
from soli.model import Transformer
from tests.checkpoint.folders import all_tensors, edit_json, edit_tensors, full_model, saved

# Inputs that groups divide, except those of o_proj (4 heads of 12) and of the experts' down projection (48).
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 48,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "num_attention_heads": 4,
    "v_head_dim": 12,
}
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as fp32, int8 and int4, converted by the command."""
    root = tmp_path_factory.mktemp("integer")
    save_model(full_model(**SIZES), root / "fp32", "fp32")
    for to in ("int8", "int4"):
        assert main(["convert", str(root / "fp32"), str(root / to), "--to", to]) == 0
    return root


@torch.no_grad()
def outputs(model: Transformer) -> tuple[Tensor, Tensor]:
    """Logits of the main model and of its MTP module."""
    hidden = model.backbone(IDS).hidden_BTD
    return model.head(hidden), model.head(model.mtp_step(0, hidden, IDS).hidden_BTD)


@pytest.mark.parametrize("to, int8_modules", [("int8", ()), ("int4", ()), ("int4", ("self_attn", "shared_experts"))])
def test_files_hold_values_and_scales_of_every_linear_weight(
    to: str, int8_modules: tuple[str, ...], folders: Path, tmp_path: Path
) -> None:
    options = [argument for name in int8_modules for argument in ("--int8", name)]
    assert main(["convert", str(folders / "fp32"), str(tmp_path / "m"), "--to", to, *options]) == 0
    written, original = all_tensors(tmp_path / "m"), all_tensors(folders / "fp32")
    for name, values in original.items():
        high = values.dim() == 1 or any(part in name for part in ("embed_tokens", "mlp.gate.", "eh_proj", "_norm"))
        if high or values.shape[1] % 32:
            assert written[name].dtype in (torch.bfloat16, torch.float32) and name + "_scale" not in written
            continue
        head = name == "lm_head.weight" or "shared_head.head" in name
        bits = 8 if to == "int8" or head or any(part in name for part in int8_modules) else 4
        group = 32 if bits == 4 else next(g for g in (128, 64, 32) if values.shape[1] % g == 0)
        expected = (INT8 if bits == 8 else INT4).quantize(values, group)
        assert torch.equal(written[name], expected.values) and torch.equal(written[name + "_scale"], expected.scale)


def test_the_configuration_describes_the_quantization(folders: Path) -> None:
    described = json.loads((folders / "int4" / "config.json").read_text())["quantization_config"]
    assert described == {
        "quant_method": "soli",
        "bits": 4,
        "group_size": 32,
        "scale_dtype": "float16",
        "modules_in_8_bits": ["lm_head"],
        "modules_to_not_convert": [
            "model.embed_tokens",
            "model.layers.*.self_attn.o_proj",
            "model.layers.*.mlp.gate",
            "model.layers.*.mlp.shared_experts.down_proj",
            "model.layers.*.mlp.experts.*.down_proj",
            "model.layers.*.embed_tokens",
            "model.layers.*.eh_proj",
        ],
    }


def test_weights_that_no_group_divides_are_listed(folders: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(folders / "fp32"), str(tmp_path / "m"), "--to", "int8", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["format"] == "int8"
    assert output.err.splitlines() == [
        f"model.layers.*.{name} stays bf16: no group of 32, 64 or 128 divides its inputs"
        for name in ("self_attn.o_proj", "mlp.shared_experts.down_proj", "mlp.experts.*.down_proj")
    ]


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_quantized_weights_compute_what_dequantized_ones_do(to: str, folders: Path) -> None:
    quantized, dense = (load_model(folders / to, dtype=torch.float32, quantized=keep) for keep in (None, False))
    for ours, theirs in zip(outputs(quantized), outputs(dense), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_in_bf16_quantized_weights_are_as_exact_as_dequantized_ones(to: str, folders: Path) -> None:
    """Not equal: a dequantized weight is rounded to bf16 first; with a quantized one, tokens may be rounded to 8 bits
    (AVX-512); and either may move a token to another expert."""
    exact = outputs(load_model(folders / to, dtype=torch.float32))[0]
    models = (load_model(folders / to, dtype=torch.bfloat16, quantized=keep) for keep in (None, False))
    ours, theirs = (float((outputs(model)[0].float() - exact).square().mean(-1).median().sqrt()) for model in models)
    assert 0 < ours < 3 * theirs and theirs < 0.1 * float(exact.square().mean().sqrt())


def test_more_bits_lose_less(folders: Path) -> None:
    exact = outputs(load_model(folders / "fp32"))[0]
    errors = {to: float((outputs(load_model(folders / to, dtype=torch.float32))[0] - exact).norm() / exact.norm())
            for to in ("int8", "int4")}  # fmt: skip
    assert 0 < errors["int8"] < 0.03 and errors["int8"] * 4 < errors["int4"] < 0.5


def test_quantized_weights_stay_in_the_mapped_file(folders: Path) -> None:
    model = load_model(folders / "int4")
    experts, kv_b = model.layers[1].mlp.experts.quantized, model.layers[1].self_attn.kv_b_proj.quantized
    assert experts is not None and kv_b is not None
    weights = [*experts.gates, *experts.ups, *experts.downs, kv_b]
    assert len({weight.values.untyped_storage().data_ptr() for weight in weights}) == 1
    assert {weight.format for weight in weights} == {"int4", "bf16"}
    names = set(model.state_dict())
    assert "layers.1.mlp.experts.gate_up_proj" not in names and "embed_tokens.weight" in names
    assert model.lm_head.quantized is not None and model.lm_head.quantized.format == "int8"


@pytest.mark.parametrize("sizes", [{}, SIZES | {"hidden_size": 264}])
def test_fp8_files_compute_as_stored(sizes: dict[str, int], tmp_path: Path) -> None:
    """Also where an expert's width is no multiple of a block's side, so that gate and up share no row of blocks."""
    save_model(full_model(**sizes), tmp_path / "m", "fp8", shard_bytes=60_000)
    quantized, dense = (load_model(tmp_path / "m", dtype=torch.float32, quantized=keep) for keep in (True, None))
    assert dense.layers[1].mlp.experts.quantized is None
    experts = quantized.layers[1].mlp.experts.quantized
    assert isinstance(experts, QuantizedExperts) and experts.ups[0].format == "fp8"
    assert quantized.lm_head.quantized is None
    for ours, theirs in zip(outputs(quantized), outputs(dense), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_quantized_false_and_true_change_nothing_where_nothing_is_quantized(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    states = [load_model(folder, quantized=quantized).state_dict() for quantized in (None, True, False)]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])


def test_integers_are_converted_only_to_floats(folders: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(folders / "int4"), str(tmp_path / "m"), "--to", "fp32"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    ours, theirs = all_tensors(tmp_path / "m"), load_model(folders / "int4", dtype=torch.float32, quantized=False)
    assert torch.equal(ours["model.layers.0.mlp.up_proj.weight"], theirs.layers[0].mlp.up_proj.weight)
    for to in ("fp8", "int8", "int4"):
        assert main(["convert", str(folders / "int8"), str(tmp_path / to), "--to", to]) == 1
        assert "quantized as integers already" in capsys.readouterr().err and not (tmp_path / to).exists()


def test_fp8_files_become_integers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", format="fp8")
    assert main(["convert", str(folder), str(tmp_path / "b"), "--to", "int4", "--shard-gb", "0.00006"]) == 0
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    values = load_model(folder, dtype=torch.float32).layers[0].mlp.down_proj.weight
    quantized = load_model(tmp_path / "b").layers[0].mlp.down_proj.quantized
    assert quantized is not None and torch.equal(quantized.values, INT4.quantize(values).values)


def test_a_model_saves_itself_as_int4_but_not_when_quantized(folders: Path, tmp_path: Path) -> None:
    save_model(full_model(**SIZES), tmp_path / "m", "int4")
    assert torch.equal(all_tensors(tmp_path / "m")[EXPERT], all_tensors(folders / "int4")[EXPERT])
    with pytest.raises(SoliError, match=r"quantized=False"):
        save_model(load_model(tmp_path / "m"), tmp_path / "n")
    save_model(load_model(tmp_path / "m", quantized=False), tmp_path / "n")


@pytest.mark.parametrize("options", [["--to", "bf16", "--group", "32"], ["--to", "int4", "--group", "48"],
                                     ["--to", "int8", "--int8", "self_attn"]])  # fmt: skip
def test_options_that_do_not_go_together(options: list[str], folders: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(folders / "fp32"), str(tmp_path / "m"), *options]) == 1
    assert capsys.readouterr().err.startswith("soli: ") and not (tmp_path / "m").exists()


def test_the_group_can_be_chosen(folders: Path, tmp_path: Path) -> None:
    assert main(["convert", str(folders / "fp32"), str(tmp_path / "m"), "--to", "int4", "--group", "128"]) == 0
    tensors = all_tensors(tmp_path / "m")
    assert tensors[EXPERT + "_scale"].shape == (48, 1)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape[1] == 1


def edited(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = make(tensors[name])

    return lambda folder: edit_tensors(folder / "model.safetensors", edit)


def quantization(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda d: d["quantization_config"].update(changes))


def dropped(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(name))


DAMAGES = {
    "missing scale": (dropped(EXPERT + "_scale"), (EXPERT, "_scale are missing")),
    "scale without a weight": (edited(EXPERT, lambda t: torch.zeros(48, 128)), (EXPERT, "F32", "needs none")),
    "scale of a wrong shape": (edited(EXPERT + "_scale", lambda t: t[:, :3].clone()), (EXPERT, "(48, 3)", "(48, 4)")),
    "scale of a wrong dtype": (edited(EXPERT + "_scale", Tensor.float), (EXPERT, "F32", "F16")),
    "values of a wrong shape": (edited(EXPERT, lambda t: t[:, :50].clone()), (EXPERT, "(48, 50)", "(48, 64)")),
    "a quantized norm": (edited("model.norm.weight", Tensor.char), ("model.norm.weight", "I8")),
    "a quantized router": (edited("model.layers.1.mlp.gate.weight", Tensor.char), ("mlp.gate.weight", "I8")),
    "4 bits in an 8-bit folder": (quantization(bits=8), ("int4", "quantization_config")),
    "3 bits": (quantization(bits=3), ("config.json", "bits is 3", "8 or 4")),
    "another method": (quantization(quant_method="gptq"), ("config.json", "gptq")),
    "an MTP head that differs": (
        edited("model.layers.2.shared_head.head.weight_scale", lambda t: t * 2), ("shared_head.head", "differs")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_an_error_that_names_file_and_tensor(name: str, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "int4", tmp_path / "m")
    damage, words = DAMAGES[name]
    damage(tmp_path / "m")
    with pytest.raises(SoliError) as raised:
        load_model(tmp_path / "m")
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_checkpoint_returns_quantized_slots(folders: Path) -> None:
    checkpoint = open_checkpoint(folders / "int8")
    slot = next(slot for slot in checkpoint.slots if slot.name == EXPERT)
    quantized = checkpoint.quantized(slot)
    assert isinstance(quantized, QuantizedWeight) and (quantized.format, quantized.group) == ("int8", 128)
