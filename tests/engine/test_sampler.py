"""Sampling: filters against a plain reference, frequencies against probabilities, and refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soli.engine.sampler import Sampler, SamplingParams, nucleus
from soli.errors import SoliError

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 3.0, 0.0, 1.0]])


def reference(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Probabilities by the definition: top-k, then the smallest set of likeliest tokens that holds top_p."""
    weights = torch.tensor(logits, dtype=torch.float64).div(params.temperature).softmax(0).tolist()
    order = sorted(range(len(logits)), key=lambda token: -weights[token])[: params.top_k or None]
    total, kept, held = sum(weights[token] for token in order), {}, 0.0
    for token in order:
        if kept and held >= params.top_p:
            break
        kept[token] = weights[token] / total
        held += kept[token]
    return {token: share / held for token, share in kept.items()}


@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=20, unique=True),
    temperature=st.floats(0.2, 5),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.05, 0.999),
)
def test_nucleus_is_the_definition(logits, temperature, top_k, top_p):
    values, params = [value / 10 for value in logits], SamplingParams(temperature, top_k, top_p)
    probabilities_BV, tokens_BV = nucleus(torch.tensor([values], dtype=torch.float64), [params])
    share = probabilities_BV[0] / probabilities_BV[0].sum()
    found = {token: p for token, p in zip(tokens_BV[0].tolist(), share.tolist(), strict=True) if p > 0}
    expected = reference(values, params)
    assert found.keys() == expected.keys()
    assert all(abs(found[token] - expected[token]) < 1e-9 for token in found)


def test_frequencies_follow_the_probabilities():
    draws = 6000
    params = SamplingParams(temperature=1.3, top_k=5, top_p=0.95)
    sampler = Sampler([SamplingParams(1.3, 5, 0.95, seed) for seed in range(draws)])
    counts = torch.bincount(torch.tensor(sampler.draw(LOGITS.expand(draws, -1), range(draws))), minlength=6) / draws
    expected = reference(LOGITS[0].tolist(), params)
    for token in range(6):
        assert abs(float(counts[token]) - expected.get(token, 0.0)) < 0.025
        assert (counts[token] > 0) == (token in expected)


def test_a_stream_goes_on_and_is_not_restarted():
    drawn = [Sampler([SamplingParams(3.0, seed=5)]).draw(LOGITS, [0])[0] for _ in range(3)]
    assert len(set(drawn)) == 1
    sampler = Sampler([SamplingParams(3.0, seed=5)])
    assert len({sampler.draw(LOGITS, [0])[0] for _ in range(40)}) > 3


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(5.0, top_k=1), SamplingParams(5.0, top_p=0.01), SamplingParams(1e-300)]
)
def test_ways_to_be_greedy(params):
    assert Sampler([params]).draw(LOGITS, [0]) == [3]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -4}, "seed is -4"),
    ],
)
def test_values_out_of_range_are_refused(values, said):
    with pytest.raises(SoliError, match=said):
        SamplingParams(**values)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(SoliError, match="not finite"):
        Sampler([SamplingParams()]).draw(torch.tensor([[0.0, float("nan")]]), [0])
