"""Whether reading ahead pays is decided by passes of both ways under the same conditions."""

import pytest

from soli.experts.prefetch import KEEP, TRIAL, Prefetcher


def decide(gain: float, warming: float = 0.0) -> Prefetcher:
    """After a trial in which passes with guesses take 1 - gain of the time, and all get faster as a cache fills."""
    prefetcher = Prefetcher()
    for number in range(2 * TRIAL):
        seconds = 1.0 + warming * (1 - number / (2 * TRIAL))
        prefetcher.observe(seconds * (1 - gain if prefetcher.enabled else 1))
    assert prefetcher.stats.trials == 1
    return prefetcher


@pytest.mark.parametrize("warming", [0.0, 1.0])
def test_guesses_are_read_where_passes_are_faster_with_them(warming: float) -> None:
    assert decide(0.1, warming).enabled
    assert not decide(-0.1, warming).enabled
    assert not decide(0.0, 0.0).enabled  # nothing gained: off


def test_the_decision_is_kept_then_tried_again() -> None:
    prefetcher = decide(0.1)
    for _ in range(KEEP):
        assert prefetcher.enabled
        prefetcher.observe(1.0)
    for _ in range(2 * TRIAL):
        prefetcher.observe(2.0 if prefetcher.enabled else 1.0)
    assert prefetcher.stats.trials == 2 and not prefetcher.enabled


@pytest.mark.parametrize(("mode", "enabled"), [("on", True), ("off", False)])
def test_a_stated_mode_stays(mode: str, enabled: bool) -> None:
    prefetcher = Prefetcher(mode)
    for _ in range(3 * TRIAL):
        prefetcher.observe(1.0)
    assert prefetcher.enabled is enabled and prefetcher.stats.trials == 0
