"""Schedules at the points where the paper's table changes (section 4.2)."""

import math

import pytest

from soli.train.schedule import bias_speed, learning_rate, mtp_weight
from soli.train.settings import BalanceSettings, LossSettings, ScheduleSettings

TRILLION = 10**12
PAPER = ScheduleSettings(
    sequence_length=4096,
    batch_sequences=15360,
    learning_rate=2.2e-4,
    final_learning_rate=2.2e-5,
    warmup_tokens=2000 * 4096 * 15360,
    constant_tokens=10 * TRILLION - 2000 * 4096 * 15360,
    cosine_tokens=43 * TRILLION // 10,
    tails=((333e9, 2.2e-5), (167e9, 7.3e-6)),
)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 2.2e-4 / 2000),  # the first step does not stand still
        (999 * 4096 * 15360, 1.1e-4),
        (PAPER.warmup_tokens, 2.2e-4),
        (10 * TRILLION - 1, 2.2e-4),
        (10 * TRILLION, 2.2e-4),
        (10 * TRILLION + 2150 * 10**9, (2.2e-4 + 2.2e-5) / 2),
        (14.3 * TRILLION, 2.2e-5),
        (14.3 * TRILLION + 332e9, 2.2e-5),
        (14.3 * TRILLION + 333e9, 7.3e-6),
        (20 * TRILLION, 7.3e-6),
    ],
)
def test_the_papers_learning_rate(tokens, rate):
    assert learning_rate(PAPER, int(tokens)) == pytest.approx(rate, rel=1e-9)


def test_total_is_the_papers():
    assert PAPER.total_tokens == 14.8 * TRILLION


def test_the_batch_does_not_move_the_curve():
    other = ScheduleSettings(**{**vars(PAPER), "batch_sequences": 3072})
    for tokens in (11 * TRILLION, 13 * TRILLION):
        assert learning_rate(other, tokens) == learning_rate(PAPER, tokens)


def test_cosine_falls_all_the_way():
    rates = [learning_rate(PAPER, 10 * TRILLION + n * 43 * 10**9) for n in range(100)]
    assert rates == sorted(rates, reverse=True) and math.isclose(rates[25], 2.2e-5 + 1.98e-4 * (1 + math.sqrt(0.5)) / 2)


def test_without_cosine_the_peak_holds():
    flat = ScheduleSettings(learning_rate=1e-3, constant_tokens=1000)
    assert learning_rate(flat, 0) == learning_rate(flat, 5000) == 1e-3


def test_gamma_and_lambda_switch():
    gamma, weight = BalanceSettings(gamma_tokens=14300), LossSettings(mtp_late_after_tokens=10000)
    assert [bias_speed(gamma, t) for t in (0, 14299, 14300)] == [1e-3, 1e-3, 0.0]
    assert [mtp_weight(weight, t) for t in (0, 9999, 10000)] == [0.3, 0.3, 0.1]
    assert bias_speed(BalanceSettings(), 10**15) == 1e-3 and mtp_weight(LossSettings(), 10**15) == 0.3
