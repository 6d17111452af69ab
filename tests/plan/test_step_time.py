"""Planned step times: published runs that the plan is not calibrated on, and how time follows what it depends on."""

import pytest

from soli.config import ModelConfig, preset, replace
from soli.plan.devices import DEVICES
from soli.plan.memory import saved_per_token
from soli.plan.step_time import (
    HIDING,
    WHOLE_STEP,
    TokenWork,
    bubble_of,
    micro_batches_in_flight,
    seconds_of_token,
    up_projections,
)

LENGTH = 4096
V3 = preset("deepseek-v3")
WITHOUT_MTP = replace(V3, {"num_nextn_predict_layers": 0})


def tokens_per_second(config: ModelConfig, device: str, precision: str, repeated: float, bubble: float) -> float:
    work = TokenWork.of(config, LENGTH, saved_per_token(config, precision, "cuda", LENGTH))
    return WHOLE_STEP * HIDING * (1 - bubble) / seconds_of_token(work, DEVICES[device], precision, repeated)


def test_the_paper_calibrates_the_plan():
    """180 K H800-hours for a trillion tokens (arXiv 2412.19437, section 1)."""
    planned = tokens_per_second(V3, "h800", "fp8", up_projections(V3, LENGTH), bubble_of("DualPipeV", 16, 120))
    assert planned == pytest.approx(1e12 / 180e3 / 3600, rel=0.02)


# NVIDIA's Automodel: pipeline 4, 8 stages on each rank, expert 64, bf16, whole blocks recomputed, no MTP, even routing
# (its performance summary of 2025-10-02).
@pytest.mark.parametrize(("devices", "micro_batches", "published"), [(256, 8, 1002), (1024, 32, 865)])
def test_other_published_runs_are_planned_within_15_percent(devices, micro_batches, published):
    planned = tokens_per_second(WITHOUT_MTP, "h100", "bf16", 1.0, bubble=3 / (8 * micro_batches + 3))
    assert planned == pytest.approx(published, rel=0.15)


def test_fp8_is_faster_where_a_device_has_it():
    def speed(device: str, precision: str) -> float:
        return tokens_per_second(V3, device, precision, 0.0, 0.0)

    assert 1.2 < speed("h800", "fp8") / speed("h800", "bf16") < 2
    assert speed("a100", "fp8") < speed("a100", "bf16") > speed("a100", "fp32")  # emulated there
    assert speed("h200", "bf16") > speed("h100", "bf16")  # for its memory's bandwidth


def test_recomputation_costs_its_share_of_a_forward_pass():
    speeds = [tokens_per_second(V3, "h800", "bf16", repeated, 0.0) for repeated in (0.0, 0.5, 1.0)]
    assert speeds[0] > speeds[1] > speeds[2] > speeds[0] / 1.4
    assert 0.05 < up_projections(V3, LENGTH) < 0.1


def test_bubbles_shrink_with_micro_batches_and_better_schedules():
    assert bubble_of("1F1B", 1, 8) == 0 and bubble_of("1F1B", 4, 1) == 3 / 4
    many = [bubble_of(name, 16, 120) for name in ("1F1B", "Interleaved1F1B", "DualPipeV")]
    assert many == sorted(many, reverse=True) and many[0] == pytest.approx(15 / 135)
    assert all(bubble_of(name, 16, 240) < bubble_of(name, 16, 120) for name in ("1F1B", "DualPipeV"))
    # arXiv 2412.19437, table 2: (P/2 - 1) (F&B + B - 3W), with F = W = 1, B = 2, F&B = 3.
    assert many[2] == pytest.approx(14 / (14 + 3 * 120), rel=0.1)


def test_micro_batches_in_flight():
    assert micro_batches_in_flight("1F1B", 1, 8) == 1 and micro_batches_in_flight("1F1B", 4, 8) == 4
    assert micro_batches_in_flight("1F1B", 4, 2) == 2 and micro_batches_in_flight("Interleaved1F1B", 4, 8) == 6
    assert micro_batches_in_flight("DualPipeV", 4, 8) == 5
