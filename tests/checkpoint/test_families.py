"""Folders of every family as they are published: read, compared with transformers, written again; and of the full-size
models by their headers alone."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from soli.checkpoint import load_model, open_checkpoint, save_model
from soli.checkpoint.convert import convert_checkpoint
from soli.checkpoint.writer import Target
from soli.cli import main
from soli.config import PRESETS, ModelConfig
from soli.errors import SoliError
from tests.checkpoint.folders import all_tensors, edit_json, edit_tensors
from tests.checkpoint.published_families import published_tensors, write_headers, write_published

IDS_BT = torch.arange(60).view(3, 20)
SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "use_cache": True,
    "attention_bias": False, "attention_dropout": 0.0, "torch_dtype": "bfloat16", "rope_theta": 10000.0,
    "rope_interleave": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MIXTURE = {
    "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.8,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}
MISTRAL_4 = {
    **{name: value for name, value in SHAPE.items() if name != "rope_theta"}, **MIXTURE, "model_type": "mistral4",
    "q_lora_rank": 20, "head_dim": 20, "first_k_dense_replace": 0,
    "rope_parameters": {
        **YARN, "type": "yarn", "rope_type": "yarn", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.3,
        "max_position_embeddings": 128, "partial_rotary_factor": 0.4, "beta_fast": 32.0, "beta_slow": 1.0,
    },
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": {
        **SHAPE, **MIXTURE, "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"],
        "q_lora_rank": 20, "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rope_scaling": None,
        "rms_norm_eps": 1e-5, "topk_method": "noaux_tc",
    },
    "sarvam_mla": {
        **SHAPE, "model_type": "sarvam_mla", "architectures": ["SarvamMLAForCausalLM"], "num_experts": 8,
        "num_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "score_function": "sigmoid", "head_dim": 24,
        "q_head_dim": 20, "rope_scaling": {**YARN, "type": "deepseek_yarn"}, "use_qk_norm": True,
    },
    "youtu": {
        **SHAPE, "model_type": "youtu", "architectures": ["YoutuForCausalLM"], "q_lora_rank": 20, "qk_head_dim": 20,
        "head_dim": 8, "tie_word_embeddings": True, "mlp_bias": False, "initializer_range": None,
        "embedding_initializer_range": None, "rope_parameters": {"rope_theta": 10000, "rope_type": "default"},
    },
    "axk1": {
        **SHAPE, **MIXTURE, "model_type": "axk1", "architectures": ["AXK1ForCausalLM"], "q_lora_rank": 20,
        "n_group": 4, "topk_group": 2, "moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    },
    "mistral4": MISTRAL_4,
}  # fmt: skip
MISTRAL_SMALL_4 = {
    "model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": MISTRAL_4,
    "vision_config": {"model_type": "pixtral", "hidden_size": 16}, "image_token_index": 10,
    "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
}  # fmt: skip


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output = model(IDS_BT)
    return getattr(output, "logits", output)


def load_quietly(folder: Path, **options: Any) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(folder, dtype=torch.float32, **options)


def theirs(folder: Path, model_type: str) -> torch.nn.Module:
    """What transformers makes of the folder."""
    # The automatic class makes mistral4 a model of images and text.
    network = transformers.Mistral4ForCausalLM if model_type == "mistral4" else transformers.AutoModelForCausalLM
    return network.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_a_published_folder_is_the_network_of_transformers(tmp_path: Path, model_type: str) -> None:
    folder = write_published(tmp_path / "m", PUBLISHED[model_type])
    expected = logits(theirs(folder, model_type))
    ours = load_quietly(folder)
    assert float((logits(ours) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("model_type", PUBLISHED)
@pytest.mark.parametrize("original", [True, False])
def test_what_is_written_is_read_by_both(tmp_path: Path, model_type: str, original: bool) -> None:
    folder = write_published(tmp_path / "m", PUBLISHED[model_type])
    model = load_quietly(folder, mtp=False)
    save_model(model, tmp_path / "ours", "fp32", shard_bytes=60_000)
    other = theirs(tmp_path / "ours", model_type)
    assert float((logits(other) - logits(model)).abs().max()) < 1e-5 * float(logits(model).abs().max())
    other.save_pretrained(tmp_path / "theirs", save_original_format=original)
    assert torch.equal(logits(load_quietly(tmp_path / "theirs")), logits(model))


@pytest.mark.parametrize("model_type", PUBLISHED)
@pytest.mark.parametrize("format", ["bf16", "fp8", "int8"])
def test_it_is_converted(tmp_path: Path, model_type: str, format: str) -> None:
    folder = write_published(tmp_path / "m", PUBLISHED[model_type])
    expected = logits(load_quietly(folder))
    convert_checkpoint(folder, tmp_path / "again", Target(format))
    again = load_quietly(tmp_path / "again")
    assert again.config.model_type == model_type
    if format == "bf16":
        assert torch.equal(logits(again), expected)
    assert logits(again).isfinite().all()


@pytest.mark.parametrize("model_type", ["axk1", "mistral4"])
def test_a_pack_of_it_has_the_same_answers(tmp_path: Path, model_type: str) -> None:
    folder = write_published(tmp_path / "m", PUBLISHED[model_type])
    convert_checkpoint(folder, tmp_path / "pack", None, pack=True)
    assert torch.equal(logits(load_quietly(tmp_path / "pack")), logits(load_quietly(folder)))


def test_mistral_small_4_is_the_text_model_of_a_model_of_images_and_text(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "m", MISTRAL_SMALL_4)
    plain = write_published(tmp_path / "plain", MISTRAL_4)
    with pytest.warns(UserWarning, match="2 tensors of images are left out"):
        model = load_model(folder)
    assert model.config.model_type == "mistral4"
    assert torch.equal(logits(model), logits(load_model(plain)))


@pytest.mark.parametrize("shape", [(8, 1, 1), (8,), (8, 2, 1)])
def test_experts_of_mistral_small_4_have_one_fp8_scale_each(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """As published: stacks of FP8 with a scale for each expert, beside scales of activations that are not used."""
    folder = write_published(tmp_path / "m", MISTRAL_4)
    plain = write_published(tmp_path / "plain", MISTRAL_4)
    exact: dict[str, torch.Tensor] = {}

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            scale = tensors[name].float().abs().amax((1, 2), keepdim=True) / 448
            values = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            exact[name] = values.float() * scale
            parts = 2 if shape == (8, 2, 1) and "gate_up" in name else 1
            stored = scale.repeat(1, parts, 1) if len(shape) == 3 else scale.view(shape)
            tensors |= {name: values, f"{name}_scale_inv": stored.contiguous()}
            tensors[f"{name}_activation_scale"] = torch.ones(8)
        for name in [name for name in tensors if name.endswith(("_proj.weight", "_with_mqa.weight"))]:
            scale = tensors[name].float().abs().max() / 448
            values = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            exact[name] = values.float() * scale
            tensors |= {name: values, f"{name}_scale_inv": scale}
            tensors[name.removesuffix("weight") + "activation_scale"] = torch.tensor(1.0)

    edit_tensors(folder / "model.safetensors", quantize)
    quantization = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=quantization))
    edit_tensors(plain / "model.safetensors", lambda tensors: tensors.update(exact))
    assert torch.equal(logits(load_quietly(folder, quantized=False)), logits(load_quietly(plain)))
    quantized = load_quietly(folder, quantized=True)
    assert float((logits(quantized) - logits(load_quietly(plain))).abs().max()) < 1e-3
    convert_checkpoint(folder, tmp_path / "again", Target("fp32"))
    assert torch.equal(logits(load_quietly(tmp_path / "again")), logits(load_quietly(plain)))


def test_router_biases_of_axk1_are_read_where_they_are(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "m", PUBLISHED["axk1"])
    assert "selected by their scores alone" in "\n".join(open_checkpoint(folder).notes)
    biases = {f"model.layers.{i}.mlp.gate.e_score_correction_bias": torch.randn(8) for i in (1, 2)}
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(biases))
    expected = logits(theirs(folder, "axk1"))
    assert not open_checkpoint(folder).notes
    assert float((logits(load_quietly(folder)) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(next(iter(biases))))
    with pytest.raises(SoliError, match=r"layers.1.mlp.gate.e_score_correction_bias.*is missing"):
        open_checkpoint(folder)


def test_axk1_may_be_spelled_in_capitals() -> None:
    config = ModelConfig.from_dict(PUBLISHED["axk1"] | {"model_type": "AXK1"})
    assert config.model_type == "axk1"


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe_lite"])
def test_other_families_norm_no_mixture(tmp_path: Path, family: str) -> None:
    """The tensor would be lost: it changes the network."""
    folder = write_published(tmp_path / "m", PUBLISHED["axk1"])
    edit_json(folder / "config.json", lambda config: config.update(model_type=family, topk_method="greedy", n_group=1))
    with pytest.raises(SoliError, match="post_mlp_layernorm"):
        open_checkpoint(folder)


def test_youtu_has_no_mixture() -> None:
    with pytest.raises(SoliError, match="n_routed_experts is 8; youtu has no mixture"):
        ModelConfig.from_dict(PUBLISHED["youtu"] | {"n_routed_experts": 8})


@pytest.mark.parametrize("name", ["minicpm3", "axk2", "deepseek_v4", "mistral_large4", "llama"])
def test_another_network_is_rejected_by_name(name: str) -> None:
    with pytest.raises(SoliError, match=f"model_type is '{name}'.*Soli reads deepseek_v3"):
        ModelConfig.from_dict(PUBLISHED["glm4_moe_lite"] | {"model_type": name})


@pytest.mark.parametrize("has_config", [True, False])
def test_mistrals_own_format_is_rejected(tmp_path: Path, has_config: bool) -> None:
    folder = write_published(tmp_path / "m", MISTRAL_4)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    if not has_config:
        (folder / "config.json").rename(folder / "params.json")
    with pytest.raises(SoliError, match="Mistral's own format"):
        load_model(folder)


FULL_SIZE = {
    "glm-4.7-flash": PRESETS["glm-4.7-flash"],
    "mistral-small-4": {"model_type": "mistral3", "text_config": PRESETS["mistral-small-4"]},
    "mistral-large-3": {k: v for k, v in PRESETS["mistral-large-3"].items() if k != "quantization_config"},
    "youtu-llm-2b": PRESETS["youtu-llm-2b"],
    "sarvam-105b": PRESETS["sarvam-105b"],
    "ax-k1": PRESETS["ax-k1"],
}
QUICK = ("youtu-llm-2b",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FULL_SIZE],
)
def test_a_full_size_folder_is_opened_counted_and_planned_by_its_headers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FULL_SIZE[name]
    folder = write_headers(tmp_path / "m", config)
    checkpoint = open_checkpoint(folder)
    parameters = sum(torch.Size(slot.shape).numel() for slot in checkpoint.slots if checkpoint.holds(slot))
    left_out = ("vision_tower.", "multi_modal_projector.")
    unused = sum(  # the dense layers of A.X-K1 have a norm that nothing uses
        torch.Size(shape).numel()
        for tensor, (_, shape) in published_tensors(config).items()
        if tensor.startswith(left_out) or (tensor == "model.layers.0.post_mlp_layernorm.weight")
    )
    assert parameters + unused == sum(torch.Size(s).numel() for _, s in published_tensors(config).values())
    assert main(["count", str(folder), "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    is_mixture = name != "youtu-llm-2b"
    assert main(["plan", str(folder), "--memory", "64GB", "--json"]) == (0 if is_mixture else 1)
    output = capsys.readouterr()
    if is_mixture:
        assert json.loads(output.out)["total_bytes"] >= 2 * min(total, parameters)
    else:
        assert "no routed experts that could stay on disk, so all of its 3,923,120,128 bytes" in output.err


def test_small_folders_hold_every_tensor_once(tmp_path: Path) -> None:
    for model_type, config in PUBLISHED.items():
        folder = write_published(tmp_path / model_type, config)
        assert all_tensors(folder).keys() == published_tensors(config).keys()
