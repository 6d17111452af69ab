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


def machine(weight_rate: float, disk_rate: float) -> MachineRates:
    return MachineRates(25e9, disk_rate, dict.fromkeys(FORMATS, weight_rate), dict.fromkeys(FORMATS, 1e12))


def weight_rate_of(sizes: ModelSizes, row: dict[str, Any], context: int) -> float:
    """At which kernels read weights in a run with all experts in memory."""
    slow, fast = 1e9, 1e12
    for _ in range(60):
        middle = (slow + fast) / 2
        speed = predict_decode(sizes, machine(middle, 1e9), 1.0, context, 1.0).tokens_per_second
        slow, fast = (middle, fast) if speed < median(row, "tokens/s") else (slow, middle)
    return slow


def measured_hit_rate(sizes: ModelSizes, row: dict[str, Any]) -> float:
    demand = sizes.config.num_experts_per_tok * sizes.layers * sizes.expert_bytes
    return 1 - 1e6 * median(row, "MB per token") / demand


@pytest.mark.parametrize("routing", ["known", "not known"])
def test_int4_from_disk_was_predicted_within_a_fifth(routing: str) -> None:
    sizes = sizes_in(models.config("large"), "int4")
    *partly, whole = rows("paging_int4")
    context = 512 + DECODED
    rate = weight_rate_of(sizes, whole, context)
    for row in partly:
        experts = sizes.config.n_routed_experts
        hits = expected_hit_rate(row["share"], experts, TYPICAL_SKEW)
        hits = measured_hit_rate(sizes, row) if routing == "known" else hits
        predicted = predict_decode(sizes, machine(rate, 1e9 * median(row, "disk GB/s")), row["share"], context, hits)
        assert predicted.tokens_per_second == pytest.approx(median(row, "tokens/s"), rel=WITHIN)


def test_one_rate_of_the_disk_explains_v3s_layers_with_every_cache() -> None:
    """It is above the recorded one, of experts that had not been read before: the host of this virtual disk keeps what
    was read."""
    sizes = sizes_in(models.config("v3-layers"), "fp8")
    predict = partial(predict_decode, sizes)
    table = rows("paging_v3_layers")

    def worst(disk_rate: float) -> float:
        errors = []
        for row in table:
            hits = measured_hit_rate(sizes, row)
            speed = predict(machine(19e9, disk_rate), row["share"], 128 + DECODED, hits).tokens_per_second
            errors.append(abs(speed / median(row, "tokens/s") - 1))
        return max(errors)

    assert all(median(row, "of disk bandwidth") > 0.9 for row in table)
    assert min(worst(rate) for rate in np.arange(1.2e9, 3e9, 1e8)) < WITHIN


@pytest.mark.parametrize("text", ["English", "Chinese", "both in turn"])
def test_hit_rates_of_the_bundled_model_are_near_those_of_the_typical_skew(text: str) -> None:
    table = json.loads((BENCHMARKS / "results" / "expert_policies.json").read_text())["rows"]
    for row in table:
        if row["trace"] == f"nano, {text}" and row["of_all"] >= 0.25:
            expected = expected_hit_rate(row["of_all"], row["shape"]["experts"], TYPICAL_SKEW)
            assert expected == pytest.approx(row["hit_rates"]["next-use"], abs=0.16)


def test_hit_rate_of_remembered_shares() -> None:
    shares_LE = np.array([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]])
    assert remembered_hit_rate(shares_LE, 2) == pytest.approx(0.7)
    assert remembered_hit_rate(shares_LE, 0) == 0 and remembered_hit_rate(shares_LE, 6) == 1
