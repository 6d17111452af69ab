"""Load, and a test of language preference that detects a planted one and nothing else."""

import numpy as np
import pytest

from soli.eval.routing import language_preference
from soli.eval.scoring import layer_loads

NAMES = ["layers.1", "layers.2"]


def texts(rng, n: int, lean: float = 0.0, wobble: float = 0.0, experts: int = 8):
    """Counts of n texts in two languages: `lean` shifts expert 0 towards Chinese, `wobble` makes each text have its own
    favourite, whatever its language. Two choices per token."""
    tokens_N = rng.integers(5, 40, n)
    languages = ["zh" if i % 2 else "en" for i in range(n)]
    counts = np.zeros((n, 2, experts), dtype=np.int64)
    for i in range(n):
        for layer in range(2):
            weights = np.ones(experts)
            weights[rng.integers(experts)] += wobble
            weights[0] += lean * (languages[i] == "zh") * (layer == 0)
            counts[i, layer] = rng.multinomial(2 * tokens_N[i], weights / weights.sum())
    return counts, tokens_N, languages


def test_load():
    [load] = layer_loads(["layers.1"], np.array([[6, 2, 0, 0]]))
    assert load.share == (0.75, 0.25, 0, 0)
    assert load.max_violation == pytest.approx(2.0)  # 6 against a mean of 2
    assert load.dead_experts == (2, 3)
    assert layer_loads(["x"], np.zeros((1, 4), dtype=np.int64))[0].max_violation == 0


def test_a_planted_preference_is_detected_and_nothing_else():
    counts, tokens, languages = texts(np.random.default_rng(0), 120, lean=1.0)
    preferences = language_preference(NAMES, counts, tokens, languages, permutations=500)
    assert (preferences[0].layer, preferences[0].expert, preferences[0].prefers) == ("layers.1", 0, "zh")
    assert preferences[0].p == pytest.approx(1 / 501)
    assert preferences[0].log2_ratio > 0.5
    chinese = [i for i, language in enumerate(languages) if language == "zh"]
    assert preferences[0].chinese == pytest.approx(counts[chinese, 0, 0].sum() / tokens[chinese].sum())
    assert all(preference.prefers != "zh" for preference in preferences[1:])
    assert all(preference.prefers is None for preference in preferences[8:])


def test_texts_with_favourites_of_their_own_are_not_taken_for_a_preference():
    """Twenty tokens of one text are not twenty independent samples: by tokens this nearly always seems a preference."""
    rejections = naive_rejections = 0
    for seed in range(20):
        counts, tokens, languages = texts(np.random.default_rng(seed), 60, wobble=25.0)
        preferences = language_preference(NAMES, counts, tokens, languages, permutations=300, seed=seed)
        rejections += any(preference.prefers for preference in preferences)
        zh = np.array([language == "zh" for language in languages])
        pooled = counts.sum(axis=0) / tokens.sum()
        difference = counts[zh].sum(axis=0) / tokens[zh].sum() - counts[~zh].sum(axis=0) / tokens[~zh].sum()
        variance = pooled * (1 - pooled / 2) * (1 / tokens[zh].sum() + 1 / tokens[~zh].sum())
        naive_rejections += bool((np.abs(difference) / np.sqrt(variance) > 3.5).any())
    assert naive_rejections >= 15
    assert rejections <= 1


def test_the_same_seed_gives_the_same_p():
    counts, tokens, languages = texts(np.random.default_rng(1), 60, lean=0.3)
    first, again = (language_preference(NAMES, counts, tokens, languages, permutations=200, seed=4) for _ in range(2))
    assert first == again


def test_too_few_texts_of_a_language_give_no_answer():
    counts, tokens, _ = texts(np.random.default_rng(2), 30)
    assert language_preference(NAMES, counts, tokens, ["zh"] * 9 + ["en"] * 21) == []
    assert language_preference(NAMES, counts, tokens, ["zh"] * 9 + [None] * 11 + ["en"] * 10) == []


def test_an_expert_that_nobody_uses_causes_no_division_by_zero():
    counts, tokens, languages = texts(np.random.default_rng(3), 40)
    counts[:, 1, 5] = 0
    preferences = language_preference(NAMES, counts, tokens, languages, permutations=200)
    assert (preferences[13].t, preferences[13].p, preferences[13].prefers) == (0.0, 1.0, None)
    assert all(np.isfinite([preference.t for preference in preferences]))
