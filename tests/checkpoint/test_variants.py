"""Folders that transformers, vLLM or llama.cpp open: other layouts of the same weights, tensors beyond the model."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

from soli.checkpoint import load_model, open_checkpoint, save_model
from soli.checkpoint.convert import convert_checkpoint
from soli.checkpoint.writer import Target
from soli.errors import SoliError
from tests.checkpoint.folders import INDEX, all_tensors, edit_json, edit_tensors, full_config, full_model, saved
from tests.model.oracle import make_model, oracle_of

IDS_BT = torch.arange(60).view(3, 20)
pytestmark = pytest.mark.filterwarnings("ignore:.*(MTP module|which config.json does not have)")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS_BT)


def notes(folder: Path, mtp: bool = True) -> str:
    return "\n".join(open_checkpoint(folder, mtp).notes)


def stack_experts(tensors: dict[str, Tensor]) -> None:
    """As transformers 5 saves a model whose original format is not kept, scales included."""
    names = sorted(tensors)
    for prefix in {name.split(".experts.")[0] for name in names if ".experts." in name}:
        own = [name for name in names if name.startswith(f"{prefix}.experts.")]
        count = len({name.split(".experts.")[1].split(".")[0] for name in own})
        for suffix in ("", "_scale_inv"):
            parts: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
            for expert in range(count):
                gate, up, down = (
                    tensors.pop(f"{prefix}.experts.{expert}.{part}_proj.weight{suffix}", None)
                    for part in ("gate", "up", "down")
                )
                if gate is not None:
                    parts["gate_up_proj"].append(torch.cat((gate, up)))
                    parts["down_proj"].append(down)
            for part, stack in parts.items():
                if stack:
                    tensors[f"{prefix}.experts.{part}{suffix}"] = torch.stack(stack)


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("options", [{}, {"quantized": True}, {"in_place": True}], ids=str)
def test_stacked_experts_are_read(tmp_path: Path, format: str, options: dict) -> None:
    save_model(full_model(moe_intermediate_size=128), tmp_path / "m", format)
    expected = logits(load_model(tmp_path / "m", **options))
    edit_tensors(tmp_path / "m" / "model.safetensors", stack_experts)
    assert any(name.endswith("experts.gate_up_proj") for name in all_tensors(tmp_path / "m"))
    assert torch.equal(logits(load_model(tmp_path / "m", **options)), expected)
    convert_checkpoint(tmp_path / "m", tmp_path / "again", Target("fp32"))
    assert any(name.endswith("experts.0.up_proj.weight") for name in all_tensors(tmp_path / "again"))


def test_transformers_writes_the_stacks_that_are_read(tmp_path: Path) -> None:
    model = make_model(full_config(num_nextn_predict_layers=0)).eval()
    oracle_of(model).save_pretrained(tmp_path / "m", save_original_format=False)
    assert any(name.endswith("experts.down_proj") for name in all_tensors(tmp_path / "m"))
    assert torch.equal(logits(load_model(tmp_path / "m")), logits(model))


@pytest.mark.parametrize("rows", [3, 5])
def test_a_stack_of_other_experts_is_named(tmp_path: Path, rows: int) -> None:
    folder = saved(tmp_path / "m", format="fp32")
    edit_tensors(folder / "model.safetensors", stack_experts)
    name = "model.layers.1.mlp.experts.down_proj"

    def resize(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.cat((tensors[name], tensors[name]))[:rows].contiguous()

    edit_tensors(folder / "model.safetensors", resize)
    with pytest.raises(SoliError, match=r"model\.layers\.1\.mlp\.experts"):
        load_model(folder)


def test_mtp_modules_that_the_configuration_does_not_have_are_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", format="fp32")
    expected = logits(load_model(folder, mtp=False))
    for edit in (
        lambda config: config.update(num_nextn_predict_layers=0),
        lambda config: config.update(num_nextn_predict_layers=None),
        lambda config: config.pop("num_nextn_predict_layers"),
    ):
        edit_json(folder / "config.json", edit)
        for mtp in (True, False):
            with pytest.warns(UserWarning, match=r"holds layer 2, which config\.json does not have.*predict_layers 0"):
                model = load_model(folder, mtp=mtp)
            assert len(model.mtp) == 0 and torch.equal(logits(model), expected)
    convert_checkpoint(folder, tmp_path / "again", Target("bf16"))
    assert not any("layers.2." in name for name in all_tensors(tmp_path / "again"))


def test_layers_behind_the_last_need_a_decision(tmp_path: Path) -> None:
    """A layer that is no MTP module may mean that num_hidden_layers is wrong."""
    folder = saved(tmp_path / "m", format="fp32")
    copies = {name.replace("layers.1.", "layers.3."): tensor for name, tensor in all_tensors(folder).items()}
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(copies))
    with pytest.raises(SoliError, match=r"layers\.3\..*raise num_nextn_predict_layers.*num_hidden_layers.*mtp=False"):
        load_model(folder)
    assert "holds layer 3" in notes(folder, mtp=False)
    assert load_model(folder, mtp=False).config.num_hidden_layers == 2


@pytest.mark.parametrize("mtp", [True, False])
def test_a_head_of_its_own_counts_more_than_the_flag_that_ties_it(tmp_path: Path, mtp: bool) -> None:
    folder = saved(tmp_path / "m", format="fp32")
    expected = logits(load_model(folder, mtp=mtp))
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    with pytest.warns(UserWarning, match="tie_word_embeddings is true in config.json"):
        model = load_model(folder, mtp=mtp)
    assert not model.config.tie_word_embeddings and torch.equal(logits(model), expected)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(theirs).logits, expected, atol=1e-4)


def test_a_tied_head_that_repeats_the_embedding_stays_tied(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_model(full_model(tie_word_embeddings=True), folder, "fp32")
    expected = logits(load_model(folder))
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    assert not notes(folder) and torch.equal(logits(load_model(folder)), expected)


def test_an_index_that_names_the_one_file_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    expected = logits(load_model(folder))
    weight_map = dict.fromkeys(all_tensors(folder), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(logits(load_model(folder)), expected)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"x": "model-2.safetensors"}}))
    with pytest.raises(SoliError, match="holds both"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_of_any_float_type_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = saved(tmp_path / "m", format="fp8")

    def rounded(tensors: dict[str, Tensor], to: torch.dtype) -> None:
        for name, tensor in tensors.items():
            if name.endswith("_scale_inv"):
                tensors[name] = tensor.to(dtype).to(to)

    edit_tensors(folder / "model.safetensors", lambda tensors: rounded(tensors, torch.float32))
    expected = logits(load_model(folder)), logits(load_model(folder, quantized=True))
    edit_tensors(folder / "model.safetensors", lambda tensors: rounded(tensors, dtype))
    actual = logits(load_model(folder)), logits(load_model(folder, quantized=True))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_glm4_moe_lite_is_the_same_network(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32}
    widths = {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32, "vocab_size": 100}
    torch.manual_seed(0)
    for types in (None, ["dense", "dense", "sparse"]):
        config = Glm4MoeLiteConfig(
            **sizes, **heads, **widths, n_routed_experts=8, num_experts_per_tok=2, mlp_layer_types=types
        )
        theirs = Glm4MoeLiteForCausalLM(config).eval()
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.2)
        folder = tmp_path / f"m{types is None}"
        theirs.save_pretrained(folder)
        ours = load_model(folder)
        assert torch.allclose(logits(ours), logits(theirs).logits, atol=1e-4)
        save_model(ours, folder / "again", "fp32")
        again = AutoModelForCausalLM.from_pretrained(folder / "again")
        assert type(again) is Glm4MoeLiteForCausalLM
        assert torch.equal(logits(again).logits, logits(theirs).logits)


BUFFERS = (
    "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.1.self_attn.k_scale",
    "model.layers.1.self_attn.attn.v_scale",
    "model.layers.1.self_attn.kv_scale",
)


def with_buffers(folder: Path) -> None:
    buffers = {name: torch.ones(4) for name in BUFFERS}
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(buffers))


def with_empty_quantization(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={}))


def with_other_kv_heads(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_key_value_heads=1))


def with_byte_order_mark(folder: Path) -> None:
    file = folder / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


@pytest.mark.parametrize("edit", [with_buffers, with_empty_quantization, with_other_kv_heads, with_byte_order_mark])
def test_what_has_no_effect_is_ignored(tmp_path: Path, edit: Callable[[Path], None]) -> None:
    folder = saved(tmp_path / "m", format="fp32")
    expected = logits(load_model(folder))
    edit(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(load_model(folder)), expected)
        convert_checkpoint(folder, tmp_path / "again", Target("fp32"))
    assert torch.equal(logits(load_model(tmp_path / "again")), expected)
