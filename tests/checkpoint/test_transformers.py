"""Files saved by Soli are loaded by transformers, and vice versa."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from soli.checkpoint import load_model, save_model
from soli.config import ModelConfig
from tests.checkpoint.folders import full_config
from tests.model.oracle import draw_config, draw_v2_config, make_model, oracle_of

CONFIGS = [draw_config(seed) for seed in range(4)] + [draw_v2_config(seed) for seed in range(2)]
IDS_BT = torch.arange(60).view(3, 20)
# transformers names what it would not load, layer L and empty shared experts; both are known here.
pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS_BT)
    return out if isinstance(out, torch.Tensor) else out.logits


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_soli_to_transformers(config: ModelConfig, tmp_path: Path) -> None:
    """Through the files or by copying the weights in memory: transformers computes the same bits."""
    model = make_model(config).eval()
    save_model(model, tmp_path / "m", "fp32", shard_bytes=100_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert theirs.dtype == torch.float32
    assert torch.equal(logits(theirs), logits(oracle_of(model)))
    assert close(logits(model), logits(theirs))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_transformers_to_soli(config: ModelConfig, tmp_path: Path) -> None:
    """Soli computes the same bits from transformers' files as from the weights that went into them."""
    model = make_model(config).eval()
    oracle_of(model).save_pretrained(tmp_path / "m", max_shard_size="100KB")
    again = load_model(tmp_path / "m")
    assert torch.equal(logits(again), logits(model))
    assert close(logits(again), logits(oracle_of(model)))


def test_bf16_files_hold_the_same_weights_for_both(tmp_path: Path) -> None:
    save_model(make_model(full_config(num_nextn_predict_layers=0)), tmp_path / "m", "bf16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(logits(oracle_of(load_model(tmp_path / "m", dtype=torch.float32))), logits(theirs))


@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8_files_with_mtp_are_dequantized_alike(ue8m0: bool, tmp_path: Path, monkeypatch) -> None:
    """transformers skips the MTP layer and unpacks FP8 by its own code; whole blocks, for it stretches ragged ones."""
    # It asks for accelerate, which the CPU does not need.
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    sides = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128}
    heads = {"kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 128, "v_head_dim": 32}
    model = make_model(full_config(**sides, **heads, num_attention_heads=4))
    save_model(model, tmp_path / "m", "fp8", ue8m0=ue8m0)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    ours = load_model(tmp_path / "m", dtype=torch.float32, mtp=False).state_dict()
    for name, values in theirs.state_dict().items():
        assert torch.equal(values.float(), ours[name.removeprefix("model.")]), name
