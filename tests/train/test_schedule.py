"""Schedules at the points where the paper's table changes (section 4.2)."""

import math

import pytest

from soli.data.recipe import load_recipe
from soli.train.schedule import (
    ScheduleSettings,
    batch_sequences,
    learning_rate,
    steps_before,
    tokens_after,
    warmup_end,
)
from soli.train.settings import BalanceSettings, LossSettings, read_settings

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
        (0, 2.2e-4 / 2000),  # the first step has a rate above 0
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


def test_the_batch_does_not_change_the_curve():
    other = ScheduleSettings(**{**vars(PAPER), "batch_sequences": 3072})
    for tokens in (11 * TRILLION, 13 * TRILLION):
        assert learning_rate(other, tokens) == learning_rate(PAPER, tokens)


def test_cosine_falls_throughout():
    rates = [learning_rate(PAPER, 10 * TRILLION + n * 43 * 10**9) for n in range(100)]
    assert rates == sorted(rates, reverse=True) and math.isclose(rates[25], 2.2e-5 + 1.98e-4 * (1 + math.sqrt(0.5)) / 2)


def test_without_cosine_the_peak_holds():
    flat = ScheduleSettings(learning_rate=1e-3, constant_tokens=1000)
    assert learning_rate(flat, 0) == learning_rate(flat, 5000) == 1e-3


def test_gamma_and_lambda_switch():
    gamma, weight = BalanceSettings(gamma_tokens=14300), LossSettings(mtp_late_after_tokens=10000)
    assert [gamma.gamma_at(t) for t in (0, 14299, 14300)] == [1e-3, 1e-3, 0.0]
    assert [weight.mtp_weight_at(t) for t in (0, 9999, 10000)] == [0.3, 0.3, 0.1]
    assert [LossSettings(mtp_from_tokens=7).trains_mtp(t) for t in (0, 6, 7)] == [False, False, True]
    assert BalanceSettings().gamma_at(10**15) == 1e-3 and LossSettings().mtp_weight_at(10**15) == 0.3


PAPER_RECIPE = read_settings(load_recipe("671b"))
B, T = 10**9, 10**12


def test_the_shipped_recipe_is_the_papers_table():
    schedule, warm = PAPER_RECIPE.schedule, warmup_end(PAPER_RECIPE.schedule)
    assert schedule.total_tokens == 14_800 * B and learning_rate(schedule, 0) == pytest.approx(2.2e-4 / 2000)
    assert steps_before(schedule, warm) == 2000 and tokens_after(schedule, 2000) == warm
    rates = {warm: 2.2e-4, 469 * B: 2.2e-4, 10 * T: 2.2e-4, 12_150 * B: 1.21e-4, 14_300 * B: 2.2e-5}
    rates |= {14_633 * B - 1: 2.2e-5, 14_633 * B: 7.3e-6, 14_800 * B: 7.3e-6}
    for tokens, rate in rates.items():
        assert learning_rate(schedule, tokens) == pytest.approx(rate, rel=1e-9), tokens
    assert [batch_sequences(schedule, t) for t in (0, 469 * B, 10 * T)] == [3072, 15360, 15360]
    assert batch_sequences(schedule, 469 * B // 2) == (3072 + 15360) // 2
    assert [PAPER_RECIPE.balance.gamma_at(t) for t in (0, 14_300 * B - 1, 14_300 * B)] == [1e-3, 1e-3, 0.0]
    assert [PAPER_RECIPE.losses.mtp_weight_at(t) for t in (0, 10 * T - 1, 10 * T)] == [0.3, 0.3, 0.1]
    phases = [(e.sequence_length, e.batch_sequences, e.total_steps) for e in PAPER_RECIPE.extension]
    assert phases == [(32768, 1920, 1000), (131072, 480, 1000)]
    assert PAPER_RECIPE.extension[1].extend_context(PAPER_RECIPE.model).max_position_embeddings == 163840


def test_the_ramp_grows_in_whole_steps():
    schedule, tokens, batches = PAPER_RECIPE.schedule, 0, []
    while tokens < 480 * B:
        assert steps_before(schedule, tokens) == len(batches) and tokens_after(schedule, len(batches)) == tokens
        batches.append(batch_sequences(schedule, tokens))
        tokens += batches[-1] * 4096
    assert batches == sorted(batches) and batches[0] == 3072 and batches[-1] == 15360
    assert steps_before(schedule, tokens + 1) == len(batches) + 1


def test_warm_up_in_steps_equals_warm_up_in_tokens_without_a_ramp():
    shape = {"sequence_length": 8, "batch_sequences": 4, "learning_rate": 1e-3, "constant_tokens": 640}
    by_steps, by_tokens = ScheduleSettings(**shape, warmup_steps=10), ScheduleSettings(**shape, warmup_tokens=320)
    assert by_steps.total_tokens == by_tokens.total_tokens
    for step in range(30):
        assert learning_rate(by_steps, 32 * step) == pytest.approx(learning_rate(by_tokens, 32 * step))
