"""Sampling: filters, penalties and log-probabilities against plain references, seeds, frequencies, and rejections."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soli.engine.sampler import Distribution, SampledToken, SamplerState, SamplingParams, distribution, sample
from soli.errors import SoliError

LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0, 1.0])
V = len(LOGITS)


def state(prompt=(), **params) -> SamplerState:
    return SamplerState(SamplingParams(**params), prompt, V)


def draw(states, logits_V=LOGITS) -> list[int]:
    """One token for each state, all from the same logits."""
    return [sampled.token for sampled in sample(logits_V.expand(len(states), -1), states)]


def filtered(logits_V: np.ndarray, params: SamplingParams) -> Distribution:
    return distribution(logits_V, params.temperature, params.top_k, params.top_p, params.min_p)


def reference(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Probabilities by the definitions: top-k, the smallest set of likeliest tokens that holds top_p, then min-p."""
    weights = torch.tensor(logits, dtype=torch.float64).div(params.temperature).softmax(0).tolist()
    order = sorted(range(len(logits)), key=lambda token: -weights[token])[: params.top_k or None]
    total, cumulative = sum(weights[token] for token in order), 0.0
    nucleus: dict[int, float] = {}
    for token in order:
        if nucleus and params.top_p < 1 and cumulative >= params.top_p:
            break
        nucleus[token] = weights[token] / total
        cumulative += nucleus[token]
    shares = {token: share for token, share in nucleus.items() if share >= params.min_p * nucleus[order[0]]}
    return {token: share / sum(shares.values()) for token, share in shares.items()}


@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=20, unique=True),
    temperature=st.floats(0.2, 5),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.05, 0.999) | st.just(1.0),
    min_p=st.floats(0, 0.9),
)
def test_the_filters_are_their_definitions(logits, temperature, top_k, top_p, min_p):
    values = [value / 10 for value in logits]
    params = SamplingParams(temperature, top_k, top_p, min_p=min_p)
    result = filtered(np.array(values, dtype=np.float32), params)
    expected = reference([float(np.float32(value)) for value in values], params)
    assert result.tokens_K.tolist() == sorted(expected)
    for token, share in zip(result.tokens_K.tolist(), result.probabilities_K.tolist(), strict=True):
        assert abs(share - expected[token]) < 1e-9
        assert result.probability(token) == share
    assert all(result.probability(token) == 0 for token in range(len(values)) if token not in expected)


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 1}, {"top_p": 0.1}])
def test_tokens_tied_with_the_last_one_pass_the_filter_too(params):
    result = filtered(np.array([1, 3, 0, 3, 3], dtype=np.float32), SamplingParams(1.0, **params))
    assert result.tokens_K.tolist() == [1, 3, 4]


def penalised_reference(logits, prompt, answer, params: SamplingParams) -> list[float]:
    """The formulas of OpenAI's and Hugging Face's documentation, a token at a time."""
    result, counts = list(logits), Counter(answer)
    for token, logit in enumerate(logits):
        if token in counts or token in prompt:
            logit = logit * params.repetition_penalty if logit < 0 else logit / params.repetition_penalty
        logit -= counts[token] * params.frequency_penalty + (counts[token] > 0) * params.presence_penalty
        result[token] = logit + params.logit_bias.get(token, 0.0)
    return result


TOKENS = st.lists(st.integers(0, V - 1), max_size=8)


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V),
    prompt=TOKENS,
    answer=TOKENS,
    rejected=TOKENS,
    params=st.builds(
        SamplingParams,
        repetition_penalty=st.floats(0.5, 2),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=3),
    ),
)
def test_penalties_are_their_formulas_and_can_be_rolled_back(logits, prompt, answer, rejected, params):
    row_V, counted = np.array(logits, dtype=np.float32), SamplerState(params, prompt, V)
    for token in [*answer, *rejected]:
        counted.accept(token)
    counted.rollback(len(rejected))
    assert counted.position == len(answer)
    expected = penalised_reference(logits, prompt, answer, params)
    np.testing.assert_allclose(counted.process(row_V), expected, rtol=1e-5, atol=1e-4)
    assert row_V.tolist() == logits


def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, answer = [0, 1], [3, 3]
    counted = state(prompt, repetition_penalty=1.3)
    for token in answer:
        counted.accept(token)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + answer]), LOGITS[None].clone())
    assert counted.process(LOGITS.numpy()).tolist() == pytest.approx(theirs[0].tolist())


def test_filters_are_those_of_transformers():
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_BV = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * 3
    params = SamplingParams(1.4, top_k=60, top_p=0.9, min_p=0.03)
    theirs_BV = logits_BV
    for warper in (TemperatureLogitsWarper(1.4), TopKLogitsWarper(60), TopPLogitsWarper(0.9), MinPLogitsWarper(0.03)):
        theirs_BV = warper(None, theirs_BV)
    for row_V, theirs_V in zip(logits_BV, theirs_BV.softmax(dim=-1), strict=True):
        result = filtered(row_V.numpy(), params)
        assert result.tokens_K.tolist() == theirs_V.nonzero().flatten().tolist()
        np.testing.assert_allclose(result.probabilities_K, theirs_V[result.tokens_K].numpy(), rtol=1e-4)


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_the_nucleus_of_a_large_vocabulary(spread):
    logits_V = (np.random.default_rng(3).standard_normal(3000) * spread).astype(np.float32)
    weights = np.exp(logits_V.astype(np.float64))
    order = np.argsort(-weights)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        size = int(np.searchsorted(weights[order].cumsum(), top_p * weights.sum())) + 1
        result = filtered(logits_V, SamplingParams(1.0, top_p=top_p))
        assert result.tokens_K.tolist() == sorted(order[:size].tolist())


@pytest.mark.parametrize("size", [1, 2, 1023, 1024, 1025, 5000])
def test_a_draw_inverts_the_cumulative_distribution(size):
    shares = np.random.default_rng(size).random(size) + 1e-3
    result = Distribution(np.arange(size) * 2, shares / shares.sum())
    cumulative = result.probabilities_K.cumsum()
    for uniform in [0.0, 0.5, *(cumulative - result.probabilities_K / 2)[:: max(1, size // 50)], 1 - 2.0**-53]:
        index = result.draw(float(uniform)) // 2
        assert cumulative[index] - result.probabilities_K[index] - 1e-9 <= uniform <= cumulative[index] + 1e-9


def test_frequencies_follow_the_probabilities():
    draws = 6000
    params = {"temperature": 1.3, "top_k": 5, "top_p": 0.95}
    tokens = draw([state(seed=seed, **params) for seed in range(draws)])
    counts = torch.bincount(torch.tensor(tokens), minlength=V) / draws
    expected = reference(LOGITS.tolist(), SamplingParams(**params))
    for token in range(V):
        assert abs(float(counts[token]) - expected.get(token, 0.0)) < 0.025
        assert (counts[token] > 0) == (token in expected)


def test_a_draw_depends_on_the_seed_and_the_position_alone():
    def text(own: SamplerState, others: int = 0, rejected: int = 0) -> list[int]:
        tokens: list[int] = []
        for _ in range(30):
            neighbours = [state(temperature=9.0, seed=other) for other in range(others)]
            tokens.append(draw([*neighbours, own])[-1])
            for guess in range(rejected):
                own.accept(guess)
            own.rollback(rejected)
            own.accept(tokens[-1])
        return tokens

    first = text(state(temperature=3.0, seed=5))
    assert len(set(first)) > 3
    assert first == text(state(temperature=3.0, seed=5), others=3) == text(state(temperature=3.0, seed=5), rejected=2)
    assert first != text(state(temperature=3.0, seed=6))
    assert text(state(temperature=3.0)) != text(state(temperature=3.0))
    resumed = state(temperature=3.0, seed=5)
    for token in first[:10]:
        resumed.accept(token)
    assert draw([resumed]) == [first[10]]


def test_each_answer_to_one_prompt_has_its_own_seed():
    params = SamplingParams(1.0, seed=7)
    seeds = [params.for_choice(choice).seed for choice in range(50)]
    assert seeds[0] == 7 and len(set(seeds)) == 50
    assert seeds == [params.for_choice(choice).seed for choice in range(50)]
    assert SamplingParams(1.0).for_choice(3).seed is None


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 5.0, "top_k": 1}, {"temperature": 5.0, "top_p": 0.01}, {"temperature": 1e-300}]
)
def test_parameters_that_are_greedy(params):
    assert draw([state(**params)]) == [3]


def test_greedy_with_a_bias_takes_the_biased_best():
    assert draw([state(logit_bias={3: -5}), state(logit_bias={4: 50}), state()]) == [0, 4, 3]


@given(logits=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=12), count=st.integers(0, 15))
def test_logprobs_are_those_of_the_model_whatever_the_sampling(logits, count):
    odd = SamplingParams(0.3, top_k=2, seed=1, logit_bias={0: 30}, repetition_penalty=1.5)
    states = [SamplerState(params, [0], len(logits)) for params in (SamplingParams(), odd)]
    expected = torch.tensor(logits, dtype=torch.float64).log_softmax(0).tolist()
    best = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:count]
    for sampled in sample(torch.tensor([logits, logits]), states, [count, count]):
        assert isinstance(sampled, SampledToken) and sampled.logprob is not None
        assert sampled.logprob.token == sampled.token
        assert math.isclose(sampled.logprob.logprob, expected[sampled.token], abs_tol=1e-9)
        assert [token for token, _ in sampled.logprob.top] == best
        assert all(math.isclose(value, expected[token], abs_tol=1e-9) for token, value in sampled.logprob.top)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": 11}, "repetition_penalty is 11"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3 is 101"),
        ({"logit_bias": {-1: 1}}, "logit_bias of token -1"),
        ({"logit_bias": {V: 1.0}}, f"names token {V}, but the model's vocabulary ends at {V - 1}"),
    ],
)
def test_values_out_of_range_are_rejected(values, message):
    with pytest.raises(SoliError, match=message):
        state(**values)


ANY_PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 1e300),
    top_k=st.integers(0, 2**70),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(-(2**63), 2**63 - 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=3),
)


@pytest.mark.filterwarnings("error")
@given(
    logits=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=V, max_size=V),
    params=ANY_PARAMS,
    answer=TOKENS,
)
def test_all_valid_parameters_sample_a_token(logits, params, answer):
    counted = SamplerState(params, [0], V)
    for token in answer:
        counted.accept(token)
    [sampled] = sample(torch.tensor([logits], dtype=torch.float32), [counted], [3])
    assert isinstance(sampled, SampledToken) and 0 <= sampled.token < V and sampled.logprob is not None
    result = counted.distribution(np.array(logits, np.float32))
    assert result.probability(sampled.token) > 0 and abs(result.probabilities_K.sum() - 1) < 1e-9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("penalty", [0.1, 10])
def test_penalties_keep_the_largest_logits_finite(penalty):
    largest = float(np.finfo(np.float32).max)
    logits = torch.tensor([[largest, -largest, 0.0, largest, -largest, 1.0]])
    counted = state(range(V), temperature=1.0, repetition_penalty=penalty, seed=0)
    assert np.isfinite(counted.process(logits[0].numpy())).all()
    assert sample(logits, [counted])[0].token in (0, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 0}])
def test_a_row_that_is_not_finite_is_rejected_and_the_others_are_not(bad, params):
    broken = LOGITS.clone()
    broken[2] = bad
    first, rejected, last = sample(torch.stack([LOGITS, broken, LOGITS]), [state(), state(**params), state()])
    assert isinstance(rejected, SoliError) and "not finite" in str(rejected)
    assert first == last == SampledToken(3)
