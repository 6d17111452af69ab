"""Counting: the published numbers exactly, and the model and the file layout to the last parameter and byte."""

import math

import pytest

from soli.analysis.parameters import cache_bytes, count, expert_read_bytes, flops
from soli.config import PRESETS, preset, replace

VARIANTS = {
    "full queries": {"q_lora_rank": None},
    "attention biases": {"attention_bias": True},
    "no shared expert": {"n_shared_experts": 0},
    "greedy, no bias": {"topk_method": "greedy"},
    "dense": {"n_routed_experts": 0},
    "every other layer": {"moe_layer_freq": 2},
    "tied head": {"tie_word_embeddings": True},
    "a norm after the mixture": {"model_type": "axk1"},
    "two MTP modules": {"num_nextn_predict_layers": 2},
    "ragged FP8 blocks": {"hidden_size": 200, "moe_intermediate_size": 72, "kv_lora_rank": 40},
}
CONFIGS = {name: preset(name) for name in PRESETS} | {
    name: replace(preset("nano"), changes) for name, changes in VARIANTS.items()
}


def test_deepseek_v3_as_published():
    counted = count(preset("deepseek-v3"))
    assert counted.total == 671_026_419_200
    assert counted.total - counted.router_biases == 671_026_404_352
    assert counted.router_biases == 14_848
    assert counted.activated == 37_552_282_624
    assert counted.activated - counted.embedding == 36_625_603_584
    assert round(counted.mtp_own / 1e9, 1) == 11.6
    assert round((counted.total + counted.mtp_files) / 1e9) == 684
    assert expert_read_bytes(preset("deepseek-v3")) == 58 * 8 * 44_040_192
    assert cache_bytes(preset("deepseek-v3")) == 2 * 61 * (512 + 64)


def test_the_released_files_have_the_counted_size():
    """DeepSeek-V3's shards are 688,586,727,753 bytes; beyond the tensors there are only the headers that name them."""
    config = preset("deepseek-v3")
    copies = 2 * 2 * config.vocab_size * config.hidden_size
    headers = 688_586_727_753 - (count(config, mtp=True).bytes_fp8 + copies)
    tensors_with_scales = 2 * 59 * 256 * 3
    assert 100 < headers / tensors_with_scales < 150


@pytest.mark.parametrize(("name", "total", "activated"), [
    ("kimi-k2", 1026.4e9, 32.9e9),
    ("kimi-k2.5", 1026.4e9, 32.9e9),
    ("glm-4.7-flash", 29.9e9, 3.9e9),
    ("mistral-large-3", 673e9, 39.5e9),
    ("mistral-small-4", 119e9, 6.6e9),
    ("sarvam-105b", 106e9, 12.4e9),  # 10.3 B without the embedding and the head
    ("ax-k1", 519e9, 33e9),
    ("youtu-llm-2b", 1.96e9, 1.96e9),
    ("moonlight-16b-a3b", 15.96e9, 2.9e9),
    ("deepseek-v2-lite", 15.7e9, 2.7e9),
])  # fmt: skip
def test_relatives_as_their_cards_say(name, total, activated):
    counted = count(preset(name))
    assert counted.total == pytest.approx(total, rel=0.002)
    assert counted.activated == pytest.approx(activated, rel=0.02)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_agrees_with_the_model_to_the_last_parameter(config):
    import torch

    from soli.model import Transformer

    model = Transformer(config, device=torch.device("meta"))
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}  # a tied head is named once
    sizes |= {name: b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    counted = count(config, mtp=True)
    assert sum(sizes.values()) == counted.total
    by_component = dict.fromkeys((c.name for c in counted.components), 0)
    for name, size in sizes.items():
        by_component[component_of(name)] += size
    assert by_component == {c.name: c.total for c in counted.components}


def component_of(name: str) -> str:
    """Where a parameter of the model belongs in the table, told by its name."""
    for part, component in (
        ("mtp.", "MTP modules"),
        ("norm", "norms"),
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
        ("self_attn", "attention"),
        (".gate.", "router"),
        (".experts.", "routed experts"),
        (".shared_experts.", "shared experts"),
        (".mlp.", "dense MLP"),
    ):
        if part in name:
            return component
    raise AssertionError(name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_agrees_with_the_file_layout_to_the_last_byte(config):
    from soli.checkpoint.name_map import Kind, slots

    fp8 = bf16 = values = 0
    for slot in slots(config):
        if slot.copy:
            continue
        size = math.prod(slot.shape)
        high = size * (4 if slot.kind is Kind.ROUTER_BIAS else 2)
        blocks = math.prod(math.ceil(side / 128) for side in slot.shape)
        values, bf16 = values + size, bf16 + high
        fp8 += size + 4 * blocks if slot.kind is Kind.LINEAR else high
    counted = count(config, mtp=True)
    assert (counted.total, counted.bytes_bf16, counted.bytes_fp8) == (values, bf16, fp8)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_activated_is_total_less_the_experts_that_are_not_selected(config):
    counted = count(config)
    unselected = config.n_routed_experts - config.num_experts_per_tok if config.n_routed_experts else 0
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert counted.total - counted.activated == config.num_moe_layers * unselected * expert + counted.router_biases


def test_flops_of_nano_by_hand():
    config = replace(preset("nano"), {"num_nextn_predict_layers": 0})
    attention = 256 * 128 + 128 * 4 * 48 + 256 * 80 + 64 * 4 * 64 + 4 * 32 * 256
    mixture = 32 * 256 + 5 * 3 * 256 * 128
    f = flops(config, context=100)
    assert f.matmul == 2 * (5 * attention + 3 * 256 * 768 + 4 * mixture + 6144 * 256)
    assert f.attention_decode == 2 * 5 * 4 * 100 * (64 + 16 + 64)
    assert f.attention_prefill == 2 * 5 * 4 * 50 * (48 + 32)
    assert (f.decode, f.prefill) == (f.matmul + f.attention_decode, f.matmul + f.attention_prefill)


def test_flops_of_mtp_add_a_module_and_the_head_again():
    config = preset("nano")
    norms = 5 * 256 + 128 + 64
    extra = flops(config, 1, mtp=True).matmul - flops(config, 1).matmul
    assert extra == 2 * (count(config).mtp_activated - norms + 6144 * 256)
