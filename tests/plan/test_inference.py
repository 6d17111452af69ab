"""The plan of a model whose experts are partly on disk: sizes, the division of memory, the model of time."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.analysis.parameters import cache_bytes, count, flops
from soli.checkpoint.load import open_checkpoint
from soli.config import preset, replace
from soli.engine.engine import Engine
from soli.engine.offline import limits_for
from soli.engine.text_model import text_model
from soli.errors import SoliError
from soli.experts.load import load_within
from soli.plan.inference import (
    ATTENTION_IN_PROMPTS,
    DISK_LATENCY,
    KERNEL_EFFICIENCY,
    LAYER_SECONDS,
    MISS_SECONDS,
    PROMPT_EFFICIENCY,
    STEP_SECONDS,
    MachineRates,
    expected_hit_rate,
    predict_decode,
    predict_prompt,
    stated_machine,
)
from soli.plan.inference_plan import divide, find_model, gpu_split, memories_to_compare, speed, upgrades
from soli.plan.sizes import FORMATS, published_format, sizes_in, sizes_of
from tests.engine.tiny import tiny_tokenizer
from tests.experts.folders import mixture_folder

V3 = preset("deepseek-v3")
MACHINE = stated_machine(80e9, 7e9, None)


def test_sizes_of_deepseek_v3_as_published():
    sizes = sizes_in(V3, published_format(V3))
    assert (sizes.format, sizes.experts, sizes.layers, sizes.least_experts) == ("fp8", 58 * 256, 58, 8)
    assert sizes.total_bytes == count(V3).bytes_fp8
    assert sizes.expert_bytes == 44_040_192 + 3 * 4 * 16 * 56
    routed = next(part for part in sizes.parts if part.name == "routed experts")
    assert routed.bytes == sizes.experts * sizes.expert_bytes
    assert routed.bytes_per_token == 58 * 8 * sizes.expert_bytes
    assert sizes.resident_bytes == sizes.total_bytes - routed.bytes
    assert sizes.mtp_bytes > 11e9


@pytest.mark.parametrize("format", ("bf16", "fp8", "int8", "int4"))
def test_sizes_by_the_configuration_are_those_of_the_files(format):
    checkpoint = open_checkpoint(mixture_folder(format))
    stored, planned = sizes_of(checkpoint), sizes_in(checkpoint.config, format)
    assert [(part.name, part.bytes) for part in stored.parts] == [(part.name, part.bytes) for part in planned.parts]
    assert (stored.format, stored.expert_bytes, stored.mtp_bytes) == (
        planned.format,
        planned.expert_bytes,
        planned.mtp_bytes,
    )


@pytest.mark.parametrize("format", ("bf16", "fp8", "int4"))
@pytest.mark.parametrize("memory", (400_000, 700_000, 5_000_000, 200_000_000))
def test_memory_is_divided_as_the_engine_divides_it(format, memory):
    folder = mixture_folder(format)
    model, budget = load_within(folder, memory, mtp=False)
    together = dataclasses.replace(text_model(model, tiny_tokenizer()), budget=budget)
    sizes = sizes_of(open_checkpoint(folder))
    division = divide(sizes, memory, 200)
    try:
        engine = Engine(together, limits_for(together, 1, 200))
    except SoliError:
        assert not division.fits
        return
    finally:
        budget.store.close()
    assert division.resident == budget.resident
    assert (division.scratch, division.latent_cache) == (budget.scratch, engine.limits.cache_bytes)
    assert division.slots == budget.store.capacity
    assert division.fits


def test_needed_bytes_are_the_fewest_that_fit():
    sizes = sizes_in(V3, "fp8")
    short = divide(sizes, 10**9, 768)
    assert not short.fits and sizes.resident_bytes < short.needed < 1.05 * sizes.resident_bytes
    assert divide(sizes, short.needed, 768).fits
    assert not divide(sizes, short.needed - 1, 768).fits
    assert speed(sizes, short, MACHINE) is None


def test_decoding_by_the_equation():
    sizes = sizes_in(V3, "fp8")
    machine = MachineRates(8e10, 7e9, dict.fromkeys(("fp8", "bf16"), 6e10), dict.fromkeys(("fp8", "bf16"), 1e15))
    prediction = predict_decode(sizes, machine, 0.0, 512, 0.0)
    read = sum(part.bytes_per_token for part in sizes.parts if part.name != "routed experts")
    expert = sizes.expert_bytes / 6e10
    layer = MISS_SECONDS + DISK_LATENCY + 8 * sizes.expert_bytes / 7e9 + 2 / 3 * expert + 8 / 3 * expert
    constant = STEP_SECONDS + 61 * LAYER_SECONDS
    assert prediction.seconds == pytest.approx((read + 512 * cache_bytes(V3)) / 6e10 + 58 * layer + constant)
    assert prediction.bound == "disk"
    assert prediction.disk_bytes == 58 * 8 * sizes.expert_bytes


def test_in_memory_decoding_is_bound_by_memory_and_a_slow_processor_by_arithmetic():
    sizes = sizes_in(V3, "fp8")
    prediction = predict_decode(sizes, MACHINE, 1.0, 512, 1.0)
    read = sum(part.bytes_per_token for part in sizes.parts) + 512 * cache_bytes(V3)
    lower = read / (KERNEL_EFFICIENCY * 80e9)
    assert lower < prediction.seconds < 1.3 * lower
    assert (prediction.bound, prediction.disk_bytes) == ("memory", 0)
    slow = stated_machine(80e9, 7e9, 1e10)
    assert predict_decode(sizes, slow, 1.0, 512, 1.0).bound == "arithmetic"


def test_a_prompt_reads_each_expert_once_per_call():
    sizes = sizes_in(V3, "fp8")
    prediction = predict_prompt(sizes, MACHINE, 0.25, 512, 256)
    every = sizes.experts * sizes.expert_bytes
    assert prediction.disk_bytes == pytest.approx(2 * 0.75 * every, rel=0.001)
    whole = predict_prompt(sizes, MACHINE, 0.25, 512, 512)
    assert whole.seconds < 0.6 * prediction.seconds
    resident = predict_prompt(sizes, stated_machine(80e12, 7e9, 1e12), 1.0, 512, 512)
    without_head = 512 * flops(V3, 512).prefill - 511 * 2 * V3.vocab_size * V3.hidden_size
    slower = 512 * flops(V3, 512).attention_prefill * (1 / ATTENTION_IN_PROMPTS - 1 / PROMPT_EFFICIENCY)
    assert resident.arithmetic_seconds == pytest.approx((without_head / PROMPT_EFFICIENCY + slower) / 1e12, rel=0.01)
    assert resident.bound == "arithmetic"


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(FORMATS))
def test_more_experts_in_memory_are_never_slower(one, other, format):
    sizes = sizes_in(V3, format)
    less, more = sorted((one, other))
    slow, fast = (predict_decode(sizes, MACHINE, share, 512, share) for share in (less, more))
    assert fast.seconds <= slow.seconds * (1 + 1e-9) and fast.disk_bytes <= slow.disk_bytes * (1 + 1e-9)
    slow, fast = (predict_prompt(sizes, MACHINE, share, 512, 237) for share in (less, more))
    assert fast.seconds <= slow.seconds * (1 + 1e-9)


@given(st.floats(0, 1), st.floats(0, 4), st.integers(1, 512))
def test_skewed_routing_hits_at_least_as_often_as_even_routing(share, skew, experts):
    rate = expected_hit_rate(share, experts, skew)
    assert share - 1e-9 <= rate <= 1 + 1e-9
    assert expected_hit_rate(share, experts) == share


def test_hit_rate_of_a_harmonic_distribution():
    harmonic = [sum(1 / rank for rank in range(1, count + 1)) for count in (24, 64)]
    assert expected_hit_rate(24 / 64, 64, 1.0) == pytest.approx(harmonic[0] / harmonic[1])


def test_upgrades_are_predictions_of_the_changed_machine():
    sizes = sizes_in(V3, "fp8")
    now = speed(sizes, divide(sizes, 128 * 10**9, 768), MACHINE)
    assert now is not None
    by_resource = {upgrade.resource: upgrade for upgrade in upgrades(sizes, 128 * 10**9, MACHINE)}
    assert by_resource["memory"].value == 256e9 and by_resource["disk"].value == 14e9
    doubled = speed(sizes, divide(sizes, 256 * 10**9, 768), MACHINE)
    assert doubled is not None
    assert by_resource["memory"].decode_tokens_per_second == doubled.decode.tokens_per_second
    assert all(upgrade.decode_tokens_per_second > now.decode.tokens_per_second for upgrade in by_resource.values())
    best = upgrades(sizes, 128 * 10**9, MACHINE)[0]
    assert best.resource == "disk"
    assert {u.resource for u in upgrades(sizes, 10**9, MACHINE)} == set()  # twice too little is too little


def test_the_split_with_a_gpu_needs_all_experts_in_memory():
    sizes = sizes_in(V3, "fp8")
    assert gpu_split(sizes, 128 * 10**9, MACHINE, 24 * 10**9).decode_tokens_per_second is None
    split = gpu_split(sizes, 700 * 10**9, MACHINE, 24 * 10**9)
    routed = 58 * 8 * sizes.expert_bytes / (KERNEL_EFFICIENCY * 80e9)
    assert split.fits_gpu and split.fits_memory and split.decode_tokens_per_second is not None
    assert split.decode_tokens_per_second < 1 / routed
    assert not gpu_split(sizes, 700 * 10**9, MACHINE, 10**10).fits_gpu


def test_memories_to_compare_reach_from_too_little_to_all():
    sizes = sizes_in(V3, "fp8")
    memories = memories_to_compare(sizes, 100 * 10**9)
    assert 100 * 10**9 in memories and memories == sorted(memories)
    assert memories[-1] >= sizes.total_bytes and len(memories) <= 8


def test_models_that_cannot_be_planned():
    dense = replace(V3, {"first_k_dense_replace": 61})
    with pytest.raises(SoliError, match="no routed experts"):
        sizes_in(dense, "bf16")
    unread = replace(V3, {"quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(SoliError, match="awq"):
        published_format(unread)


def test_a_preset_has_no_files_and_the_bundled_model_has():
    assert not find_model("deepseek-v3").stored
    nano = find_model("nano")
    assert nano.stored and nano.sizes().format == "fp8"
    assert math.isclose(nano.sizes().total_bytes, nano.sizes("fp8").total_bytes)
