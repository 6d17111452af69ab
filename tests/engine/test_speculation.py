"""Speculation: the output distribution is that of decoding without drafts, exactly and in frequencies.

Tests of frequencies have fixed seeds; their thresholds would fail a right program in one of 10,000 choices of seeds.
"""

import itertools
import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soli.engine.constraint import Constraints, ConstraintSpec
from soli.engine.sampler import REPLACE, TEST, Distribution, Draft, SamplerState, SamplingParams, sample
from soli.engine.speculation import propose, remainder, verify
from soli.engine.text_model import open_text_model
from soli.errors import SoliError
from tests.engine.oracle import continuation

V = 4
ALL = {
    "temperature": 1.3, "top_k": 3, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.2,
    "presence_penalty": 0.4, "frequency_penalty": 0.6, "logit_bias": {2: 0.7},
}  # fmt: skip
KINDS = [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, ALL]


def dense(actual: Distribution, size: int = V) -> np.ndarray:
    shares = np.zeros(size)
    shares[actual.tokens_K] = actual.probabilities_K
    return shares


logits = st.lists(st.floats(-4, 4, width=32), min_size=V, max_size=V).map(lambda row: np.array(row, np.float32))


@given(logits, logits, st.sampled_from(KINDS), st.lists(st.integers(0, V - 1), max_size=4))
def test_the_rule_gives_the_model_s_distribution_exactly(target_V, guess_V, params, answer):
    """q(d) [min(1, p(d)/q(d)) at d, the rest by the remainder], summed over drafts d, is p."""
    state = SamplerState(SamplingParams(**params), [0], V)
    for token in answer:
        state.accept(token)
    p = state.distribution(target_V)
    q = state.distribution(guess_V)
    actual = np.zeros(V)
    for token in range(V):
        keep = min(1.0, p.probability(token) / q.probability(token)) if q.probability(token) else 0.0
        actual[token] += q.probability(token) * keep
        actual += q.probability(token) * (1 - keep) * dense(remainder(p, q))
    np.testing.assert_allclose(actual, dense(p), atol=1e-12)


class Fixed(SamplerState):
    """A state whose random numbers are given."""

    numbers: dict[int, float]

    def uniform(self, purpose: int = 0) -> float:
        return self.numbers[purpose]


@pytest.mark.parametrize("params", KINDS)
def test_verify_applies_the_rule(params):
    """Over a grid of the test's and the replacement's random numbers, `verify` itself comes to p."""
    generator, points = torch.Generator().manual_seed(1), 250
    target_KV, guess_V = torch.randn(2, V, generator=generator), torch.randn(V, generator=generator)
    state = Fixed(SamplingParams(**params), [1], V)
    state.accept(2)
    q = state.distribution(guess_V.numpy())
    actual = np.zeros(V)
    for token, share in zip(q.tokens_K.tolist(), q.probabilities_K.tolist(), strict=True):
        accepted, replaced = 0, np.zeros(V)
        for point in range(points):
            at = (point + 0.5) / points
            state.numbers = {0: 0.5, TEST: at, REPLACE: 0.5}
            accepted += verify(target_KV, [Draft(token, q)], state).accepted_drafts
            state.numbers = {0: 0.5, TEST: 1.0, REPLACE: at}  # a test that fails wherever one may fail
            verified = verify(target_KV, [Draft(token, q)], state)
            if verified.accepted_drafts == 0:
                replaced[verified.tokens[0].token] += 1 / points
        actual[token] += share * accepted / points
        actual += share * (1 - accepted / points) * replaced
    np.testing.assert_allclose(
        actual, dense(state.distribution(target_KV[0].numpy())), atol=0.01
    )
    assert state.position == 1


def table(seed: int) -> torch.Tensor:
    """A model of V tokens: the logits after each text of up to three tokens, by its number in base V + 1."""
    return torch.randn((V + 1) ** 3, V, generator=torch.Generator().manual_seed(seed)) * 1.5


def row(text: tuple[int, ...]) -> int:
    return sum((token + 1) * (V + 1) ** place for place, token in enumerate(text))


def joint(model: torch.Tensor, params: SamplingParams, new: int) -> dict[tuple[int, ...], float]:
    """The probability of every text of `new` tokens, by decoding without drafts."""
    shares = {}
    for text in itertools.product(range(V), repeat=new):
        state, share = SamplerState(params, [0], V), 1.0
        for place, token in enumerate(text):
            logits_V = model[row(text[:place])].numpy()
            share *= state.distribution(logits_V).probability(token)
            state.accept(token)
        shares[text] = share
    return shares


def speculated(
    model: torch.Tensor, drafter: torch.Tensor, state: SamplerState, new: int, ahead: int
) -> tuple[int, ...]:
    """A text of `new` tokens or more with `ahead` drafts per pass."""
    text: tuple[int, ...] = ()
    while len(text) < new:
        drafts: list[Draft] = []
        for _ in range(min(ahead, new - len(text))):
            [draft] = propose(drafter[row(text + tuple(d.token for d in drafts))][None], [state])
            drafts.append(draft)
            state.accept(draft.token)
        state.rollback(len(drafts))
        guesses = tuple(draft.token for draft in drafts)
        rows = [row((text + guesses[:place])[:3]) for place in range(len(drafts) + 1)]
        for drawn in verify(model[rows], drafts, state).tokens:
            text += (drawn.token,)
            state.accept(drawn.token)
    return text[:new]


def check_frequencies(counts: Counter, expected: dict, runs: int) -> None:
    """Pearson's chi-square at a false-alarm rate of 1 in 10,000; cells of less than 5 are taken together."""
    assert all(expected.get(text, 0) > 0 for text in counts)
    large = {text: share for text, share in expected.items() if share * runs >= 5}
    cells = [(counts[text], share * runs) for text, share in large.items()]
    cells.append((runs - sum(seen for seen, _ in cells), max(runs - sum(share for _, share in cells), 1e-9)))
    if cells[-1][1] < 5:
        (seen, expected_count), (more, rest) = cells[-2:]
        cells[-2:] = [(seen + more, expected_count + rest)]
    free = len(cells) - 1
    statistic = sum((seen - expected_count) ** 2 / expected_count for seen, expected_count in cells)
    # Wilson and Hilferty 1931: the chi-square quantile from the normal one, here 3.719 for 1 - 1e-4.
    assert statistic < free * (1 - 2 / (9 * free) + 3.719 * math.sqrt(2 / (9 * free))) ** 3


@pytest.mark.parametrize("runs", [1000, pytest.param(25_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("params", [KINDS[0], ALL], ids=["plain", "all"])
def test_texts_come_as_often_as_without_drafts(params, ahead, runs):
    model, drafter = table(1), table(1) * 0.6 + table(2) * 0.5
    counts = Counter(
        speculated(model, drafter, SamplerState(SamplingParams(seed=seed, **params), [0], V), 3, ahead)
        for seed in range(runs)
    )
    check_frequencies(counts, joint(model, SamplingParams(**params), 3), runs)


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {1: 1.0}}])
def test_greedy_texts_are_the_same_with_and_without_drafts(params):
    for seed in range(20):
        model, params_ = table(seed), SamplingParams(**params)
        [expected] = [text for text, share in joint(model, params_, 3).items() if share > 0.5]
        for ahead in (1, 2):
            assert speculated(model, table(seed + 1), SamplerState(params_, [0], V), 3, ahead) == expected


def test_drafts_like_the_model_are_always_accepted():
    state = SamplerState(SamplingParams(1.0, seed=3), [], V)
    rows = table(5)[:3]
    drafts = []
    for place in range(2):
        drafts += propose(rows[place][None], [state])
        state.accept(drafts[-1].token)
    state.rollback(2)
    verified = verify(rows, drafts, state, logprobs=2)
    assert verified.accepted_drafts == 2
    assert [drawn.token for drawn in verified.tokens[:2]] == [draft.token for draft in drafts]
    assert len(verified.tokens) == 3 and len(verified.tokens[2].logprob.top) == 2


def test_a_stop_token_ends_the_drafts():
    state = SamplerState(SamplingParams(), [], V)
    rows = torch.eye(V)[[1, 2, 3]]
    drafts = propose(rows[:2], [state, state])
    assert [one.token for one in verify(rows, drafts, state).tokens] == [1, 2, 3]
    assert [one.token for one in verify(rows, drafts, state, stop_ids={2}).tokens] == [1, 2]
    assert state.position == 0


def test_logits_that_are_not_finite_end_the_request_after_what_was_good():
    state = SamplerState(SamplingParams(), [], V)
    rows = torch.eye(V)[[1, 2]]
    [draft] = propose(rows[:1], [state])
    rows[1, 0] = float("nan")
    accepted, error = verify(rows, [draft], state).tokens
    assert accepted.token == 1 and isinstance(error, SoliError)
    assert isinstance(propose(rows[1:], [state])[0], SoliError)


NANO = open_text_model("nano", mtp=True)
VOCAB = NANO.model.config.vocab_size
PROMPT = tuple(NANO.tokenizer.translation_prompt("The weather is fine today.", "zh"))


@cache
def read(text: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last two rows of nano's logits after a text, and its MTP module's logits for the token after the next."""
    with torch.inference_mode():
        hidden_BTD = NANO.model.backbone(torch.tensor([text])).hidden_BTD
        guess_BTD = NANO.model.mtp_step(0, hidden_BTD[:, :-1], torch.tensor([text[1:]])).hidden_BTD
        return NANO.model.head(hidden_BTD)[0, -2:].clone(), NANO.model.head(guess_BTD)[0, -1:].clone()


def nano_text(state: SamplerState, prompt: tuple[int, ...], new: int) -> tuple[list[int], int]:
    """nano with one draft per pass; the new tokens and how many were drafts."""
    [first] = sample(read(prompt)[0][1:], [state])
    ids, accepted = [first.token], 0
    state.accept(first.token)
    while len(ids) < new and not state.finished and ids[-1] not in NANO.stop_ids:
        [draft] = propose(read((*prompt, *ids))[1], [state])
        verified = verify(read((*prompt, *ids, draft.token))[0], [draft], state, NANO.stop_ids)
        accepted += verified.accepted_drafts
        for drawn in verified.tokens:
            assert not isinstance(drawn, SoliError), drawn
            ids.append(drawn.token)
            state.accept(drawn.token)
    return ids[:new], accepted


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.3, "frequency_penalty": 0.8}])
def test_nano_writes_the_same_greedily_with_its_own_drafts(params):
    total = 0
    for text in ("The weather is fine today.", "You can use this knife to cut wood.", "Please open the file."):
        prompt, sampling = tuple(NANO.tokenizer.translation_prompt(text, "zh")), SamplingParams(**params)
        ids, accepted = nano_text(SamplerState(sampling, prompt, VOCAB), prompt, 16)
        alone = continuation(NANO.model, prompt, 16, sampling, NANO.stop_ids)
        assert [token for token in ids if token not in NANO.stop_ids] == list(alone.ids)
        total += accepted
    assert total >= 6


def test_nano_s_sampled_texts_come_as_often_as_without_drafts():
    params = {"temperature": 1.2, "top_k": 3, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.5}
    runs, new = 600, 3
    counts: Counter = Counter()
    accepted = 0
    for seed in range(runs):
        ids, drafts = nano_text(SamplerState(SamplingParams(seed=seed, **params), PROMPT, VOCAB), PROMPT, new)
        counts[tuple(ids)] += 1
        accepted += drafts
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(new):
        longer = {}
        for text, share in expected.items():
            if text and text[-1] in NANO.stop_ids:
                longer[text] = share
                continue
            state = SamplerState(SamplingParams(**params), PROMPT, VOCAB)
            for token in text:
                state.accept(token)
            actual = state.distribution(read(PROMPT + text)[0][1].numpy())
            for token, probability in zip(actual.tokens_K.tolist(), actual.probabilities_K.tolist(), strict=True):
                longer[(*text, token)] = share * probability
        expected = longer
    assert accepted > runs / 10
    check_frequencies(counts, expected, runs)


def test_nano_s_constrained_texts_keep_to_the_constraint():
    constraints = Constraints(NANO.tokenizer, VOCAB, NANO.stop_ids)
    spec = ConstraintSpec.json_schema(
        {"type": "object", "properties": {"好": {"enum": ["是", "不是"]}}, "required": ["好"]}
    )
    greedy = SamplerState(SamplingParams(), PROMPT, VOCAB, constraints.open(spec))
    ids: list[int] = []
    while not greedy.finished and len(ids) < 60:
        [drawn] = sample(read((*PROMPT, *ids))[0][1:], [greedy])
        ids.append(drawn.token)
        greedy.accept(drawn.token)
    actual, accepted = nano_text(SamplerState(SamplingParams(), PROMPT, VOCAB, constraints.open(spec)), PROMPT, 60)
    assert actual == ids and accepted > 0
