"""Predictions beside runs that were recorded (benchmarks/results), with the rates that these recorded."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soli.plan.inference import (
    TYPICAL_SKEW,
    MachineRates,
    expected_hit_rate,
    predict_decode,
    remembered_hit_rate,
)
from soli.plan.sizes import ModelSizes, sizes_in

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import models  # noqa: E402

FORMATS = ("fp32", "bf16", "fp8", "int8", "int4")
DECODED = 16 + 24  # tokens before the middle one of those that were measured
WITHIN = 0.2


def rows(name: str) -> list[dict[str, Any]]:
    """With a share of the experts in memory, `share`."""
    table = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["rows"]
    return [row | {"share": float(row["experts in memory"].removesuffix("%")) / 100}
            for row in table if row["experts in memory"].endswith("%")]  # fmt: skip


def median(row: dict[str, Any], value: str) -> float:
    return row[value]["median"]


def machine(weight_rate: float, disk_rate: float = 1e9, disk_latency: float = 0.0) -> MachineRates:
    rates = dict.fromkeys(FORMATS, weight_rate), dict.fromkeys(FORMATS, 1e12)
    return MachineRates(25e9, disk_rate, *rates, disk_latency)


def recorded_machine(weight_rate: float, row: dict[str, Any]) -> MachineRates:
    """With the disk as it was measured beside the row's runs; in older ones its latency was not."""
    latency = median(row, "disk latency ms") if "disk latency ms" in row else 0.0
    return machine(weight_rate, 1e9 * median(row, "disk GB/s"), 1e-3 * latency)


def weight_rate_of(sizes: ModelSizes, row: dict[str, Any], context: int) -> float:
    """At which kernels read weights in a run with all experts in memory."""
    slow, fast = 1e9, 1e12
    for _ in range(60):
        middle = (slow + fast) / 2
        speed = predict_decode(sizes, machine(middle), 1.0, context, 1.0).tokens_per_second
        slow, fast = (middle, fast) if speed < median(row, "tokens/s") else (slow, middle)
    return slow


def measured_hit_rate(sizes: ModelSizes, row: dict[str, Any]) -> float:
    demand = sizes.config.num_experts_per_tok * sizes.layers * sizes.expert_bytes
    return 1 - 1e6 * median(row, "MB per token") / demand


@pytest.mark.parametrize(("format", "routing"), [("int4", "known"), ("int4", "not known"), ("fp8", "known")])
def test_experts_from_disk_were_predicted_within_a_fifth(format: str, routing: str) -> None:
    sizes = sizes_in(models.config("large"), format)
    *partly, whole = rows(f"paging_{format}")
    context = 512 + DECODED
    rate = weight_rate_of(sizes, whole, context)
    for row in partly:
        experts = sizes.config.n_routed_experts
        hits = expected_hit_rate(row["share"], experts, TYPICAL_SKEW)
        hits = measured_hit_rate(sizes, row) if routing == "known" else hits
        predicted = predict_decode(sizes, recorded_machine(rate, row), row["share"], context, hits)
        assert predicted.tokens_per_second == pytest.approx(median(row, "tokens/s"), rel=WITHIN)


def test_v3s_layers_from_disk_were_predicted_within_a_fifth() -> None:
    sizes = sizes_in(models.config("v3-layers"), "fp8")
    for row in rows("paging_v3_layers"):
        hits = measured_hit_rate(sizes, row)
        predicted = predict_decode(sizes, recorded_machine(19e9, row), row["share"], 128 + DECODED, hits)
        assert predicted.tokens_per_second == pytest.approx(median(row, "tokens/s"), rel=WITHIN)


@pytest.mark.parametrize("text", ["English", "Chinese", "both in turn"])
def test_hit_rates_of_the_bundled_model_are_near_those_of_the_typical_skew(text: str) -> None:
    table = json.loads((BENCHMARKS / "results" / "expert_policies.json").read_text())["rows"]
    for row in table:
        if row["trace"] == f"nano, {text}" and row["of_all"] >= 0.25:
            expected = expected_hit_rate(row["of_all"], row["shape"]["experts"], TYPICAL_SKEW)
            assert expected == pytest.approx(row["hit_rates"]["next-use"], abs=0.16)


def test_hit_rate_of_remembered_shares() -> None:
    shares_LE = np.array([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]])
    hit_rate = partial(remembered_hit_rate, shares_LE, 10**9)
    assert hit_rate(2) == pytest.approx(0.7)
    assert hit_rate(0) == 0 and hit_rate(6) == pytest.approx(1)


@pytest.mark.parametrize("skew", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("tokens", [100, 1000])
def test_hit_rate_of_few_tokens_is_not_the_one_of_chance(skew: float, tokens: int) -> None:
    E, K, slots = 256, 8, 2 * 64
    generator = np.random.default_rng(tokens)
    weights_E = np.arange(1, E + 1) ** -skew
    probabilities_E = weights_E / weights_E.sum()
    draws_LE = [generator.multinomial(K * tokens, generator.permutation(probabilities_E)) for _ in range(2)]
    shares_LE = np.minimum(1, np.stack(draws_LE) / tokens)
    expected = probabilities_E[: slots // 2].sum()
    hit_rate = remembered_hit_rate(shares_LE, tokens, slots)
    assert hit_rate == pytest.approx(expected, abs=0.06)
    of_largest = remembered_hit_rate(shares_LE, 10**9, slots)
    assert of_largest > expected + (0.03 if tokens == 100 else 0)
    assert abs(hit_rate - expected) < of_largest - expected
