"""Drafting where experts are read from disk: given up where it does not pay, and texts are the same."""

import pytest

from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for
from soli.engine.request import Request
from soli.engine.sampler import SamplingParams
from soli.engine.speculation import DraftingGain
from soli.engine.text_model import TextModel, open_text_model
from tests.kernels.weights import needs_kernels


def observe(gain: DraftingGain, drafted: float, without: float, module: float = 0.0, tokens: int = 2) -> None:
    """As many steps of each kind as it takes to decide."""
    for _ in range(DraftingGain.MIN_STEPS):
        gain.observe(1, 1, tokens, drafted, module)
        gain.observe(1, 0, 1, without, module)


def test_drafting_pays_where_a_token_takes_less_time_with_it() -> None:
    gain = DraftingGain()
    assert gain.pays
    observe(gain, drafted=1.8, without=1.0)
    assert gain.pays


@pytest.mark.parametrize(("drafted", "module", "tokens"), [(2.2, 0.0, 2), (1.8, 0.3, 2), (1.2, 0.0, 1)])
def test_drafting_does_not_pay_where_it_takes_more(drafted: float, module: float, tokens: int) -> None:
    gain = DraftingGain()
    observe(gain, drafted, 1.0, module, tokens)
    assert not gain.pays


def test_steps_in_which_some_draft_and_some_do_not_decide_nothing() -> None:
    gain = DraftingGain()
    for _ in range(100):
        gain.observe(3, 1, 4, 99.0, 0.0)
        gain.observe(1, 0, 1, 1.0, 0.0)
    assert gain.pays


def test_what_was_given_up_is_tried_again_after_many_tokens() -> None:
    gain = DraftingGain()
    observe(gain, drafted=9.0, without=1.0)
    gain.give_up()
    assert not gain.pays
    for _ in range(DraftingGain.RETRY_TOKENS):
        assert not gain.pays
        gain.observe(1, 0, 1, 1.0, 0.0)
    assert gain.pays


PROMPTS = ((5, 6, 7), tuple(range(20, 70)))


def texts(engine: Engine, **sampling: float) -> list[tuple[int, ...]]:
    requests = [Request(ids, 60, SamplingParams(**sampling), frozenset()) for ids in PROMPTS]  # type: ignore[arg-type]
    return [answer.ids for answer in answer_all(engine, requests) if answer is not None]


def paged(speculate: bool) -> tuple[TextModel, Engine]:
    model = open_text_model("nano", mtp=True, memory=16_000_000)
    return model, Engine(model, limits_for(model, 2, 200, speculate=speculate))


@needs_kernels
def test_greedy_texts_are_the_same_when_drafting_is_given_up_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = paged(speculate=True)
    assert model.budget is not None and not model.budget.store.holds_all
    counted = 0

    def pays(gain: DraftingGain) -> bool:
        nonlocal counted
        counted += 1
        return counted < 12

    monkeypatch.setattr(DraftingGain, "pays", property(pays))
    drafted = texts(engine)
    stats = engine.stats()
    assert 0 < stats.drafted < 30
    _, plain = paged(speculate=False)
    assert texts(plain) == drafted
    assert texts(engine) == drafted  # with what the prefix cache holds since
    assert engine.stats().drafted == stats.drafted


@pytest.mark.slow
@needs_kernels
def test_a_text_with_a_seed_does_not_depend_on_what_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    _, always = paged(speculate=True)
    expected = texts(always, temperature=1.0, seed=3)
    monkeypatch.setattr(DraftingGain, "pays", False)
    _, engine = paged(speculate=True)
    assert texts(engine, temperature=1.0, seed=3) == expected
    assert engine.stats().drafted > 60


@needs_kernels
def test_without_paging_every_request_is_drafted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftingGain, "pays", False)
    model = open_text_model("nano", mtp=True, memory=100_000_000)
    engine = Engine(model, limits_for(model, 2, 200, speculate=True))
    texts(engine)
    assert engine.stats().drafted > 0
