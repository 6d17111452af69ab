"""The name map against the model, against transformers' names, and against what the official index lists."""

from collections import Counter
from math import prod

import pytest

from soli.checkpoint.name_map import Kind, Slot, slots
from soli.checkpoint.shard import ITEM_BYTES
from soli.checkpoint.writer import Target
from soli.config import ModelConfig, preset
from soli.formats.fp8 import scale_shape
from soli.model import Transformer
from tests.checkpoint.folders import full_config
from tests.model.oracle import draw_config, draw_v2_config, make_model, oracle_of

SMALL = [draw_config(seed, num_nextn_predict_layers=seed % 3) for seed in range(6)] + [draw_v2_config(0)]
PRESETS = [preset(name) for name in ("deepseek-v3", "kimi-k2", "moonlight-16b-a3b", "deepseek-v2-lite", "nano")]
OTHERS = [full_config(tie_word_embeddings=True), full_config(n_routed_experts=0)]


@pytest.mark.parametrize("config", SMALL + PRESETS + OTHERS, ids=lambda config: f"{config.hidden_size}")
def test_slots_fill_every_element_of_the_model_once(config: ModelConfig) -> None:
    filled: Counter[str] = Counter()
    for slot in slots(config):
        if not slot.copy:
            filled[slot.soli] += prod(slot.shape)
    model = {name: tensor.numel() for name, tensor in Transformer(config, device="meta").state_dict().items()}
    if config.tie_word_embeddings:
        del model["lm_head.weight"]
    assert dict(filled) == model


@pytest.mark.parametrize("seed", range(4))
def test_names_and_shapes_are_those_that_transformers_saves(seed: int, tmp_path) -> None:
    from safetensors import safe_open

    config = draw_v2_config(seed) if seed == 3 else draw_config(seed, n_shared_experts=1)
    oracle_of(make_model(config)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {slot.name: slot.shape for slot in slots(config)} == theirs


OFFICIAL = {  # of DeepSeek-V3's index: name -> (shape, shape of weight_scale_inv or None)
    "model.embed_tokens.weight": ((129280, 7168), None),
    "lm_head.weight": ((129280, 7168), None),
    "model.norm.weight": ((7168,), None),
    "model.layers.0.mlp.gate_proj.weight": ((18432, 7168), (144, 56)),
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), (5, 56)),
    "model.layers.60.self_attn.q_b_proj.weight": ((24576, 1536), (192, 12)),
    "model.layers.60.self_attn.kv_b_proj.weight": ((32768, 512), (256, 4)),
    "model.layers.60.self_attn.kv_a_layernorm.weight": ((512,), None),
    "model.layers.3.mlp.gate.weight": ((256, 7168), None),
    "model.layers.3.mlp.gate.e_score_correction_bias": ((256,), None),
    "model.layers.3.mlp.experts.255.down_proj.weight": ((7168, 2048), (56, 16)),
    "model.layers.61.eh_proj.weight": ((7168, 14336), None),
    "model.layers.61.enorm.weight": ((7168,), None),
    "model.layers.61.hnorm.weight": ((7168,), None),
    "model.layers.61.embed_tokens.weight": ((129280, 7168), None),
    "model.layers.61.shared_head.norm.weight": ((7168,), None),
    "model.layers.61.shared_head.head.weight": ((129280, 7168), None),
    "model.layers.61.mlp.shared_experts.up_proj.weight": ((2048, 7168), (16, 56)),
    "model.layers.61.self_attn.o_proj.weight": ((7168, 16384), (56, 128)),
}


def test_the_official_index() -> None:
    by_name = {slot.name: slot for slot in slots(preset("deepseek-v3"))}

    def layout(slot: Slot) -> tuple[tuple[int, ...], tuple[int, int] | None]:
        return slot.shape, scale_shape(*slot.shape) if slot.kind is Kind.LINEAR else None

    assert {name: layout(by_name[name]) for name in OFFICIAL} == OFFICIAL
    specs = [spec for slot in by_name.values() for spec in Target("fp8").specs(slot)]
    assert len(specs) == 91_991
    assert sum(prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in specs) == 688_574_839_360  # of all 163 shards


def test_experts_are_stacked_gate_first_then_up() -> None:
    config = full_config()
    by_name = {slot.name: slot for slot in slots(config)}
    width = config.moe_intermediate_size
    for tail, stack, row in (("gate", "gate_up", 0), ("up", "gate_up", width), ("down", "down", 0)):
        slot = by_name[f"model.layers.1.mlp.experts.3.{tail}_proj.weight"]
        assert (slot.soli, slot.expert, slot.first_row) == (f"layers.1.mlp.experts.{stack}_proj", 3, row)
    assert by_name["model.layers.2.mlp.experts.0.up_proj.weight"].soli == "mtp.0.block.mlp.experts.gate_up_proj"
