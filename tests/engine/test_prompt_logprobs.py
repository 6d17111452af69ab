"""Log-probabilities of the prompt are those of teacher forcing, however the prompt is cut, cached or preempted."""

from dataclasses import replace

import pytest
import torch

from soli.engine.engine import Engine
from soli.engine.request import Answer, EngineLimits, Request
from soli.engine.sampler import SamplingParams
from tests.engine.test_engine import POSITIONS, TEXT_MODEL, engine, ids, requests, run
from tests.engine.tiny import KINDS, tiny_model, tiny_text_model


def teacher_forced(prompt: tuple[int, ...], text_model=TEXT_MODEL) -> torch.Tensor:
    """log p of every token but the first, by one forward pass of the model: float64 (T - 1, V)."""
    model = text_model.model
    with torch.inference_mode():
        logits_BTV = model.head(model.backbone(torch.tensor([prompt])).hidden_BTD)
    return torch.log_softmax(logits_BTV[0, :-1].double(), dim=-1)


def assert_teacher_forced(request: Request, logprobs, text_model=TEXT_MODEL) -> None:
    expected_TV = teacher_forced(request.prompt_ids, text_model)
    assert [one.token for one in logprobs] == list(request.prompt_ids[1:])
    for position, one in enumerate(logprobs):
        assert one.logprob == pytest.approx(float(expected_TV[position, one.token]), abs=1e-5)
        best = expected_TV[position].topk(max(1, request.prompt_logprobs))
        assert len(one.top) == request.prompt_logprobs
        for (_, value), expected in zip(one.top, best.values.tolist(), strict=False):
            assert value == pytest.approx(expected, abs=1e-5)


def scored(events):
    return [one for event in events for one in event.prompt_logprobs]


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_teacher_forcing(kind):
    text_model = tiny_text_model(kind)
    prompt = tuple(range(40, 90))
    request = Request(prompt, 3, prompt_logprobs=2)
    [events] = run(Engine(text_model, EngineLimits(cache_bytes=2**20)), [request]).values()
    assert_teacher_forced(request, scored(events), text_model)


@pytest.mark.parametrize("tokens_per_step", [16, 17, 512])
def test_a_prompt_in_parts_among_others_has_the_same(tokens_per_step):
    scoring = requests(6, seed=3, prompt_logprobs=1)
    events = run(engine(tokens_per_step=tokens_per_step), scoring + requests(6, seed=4))
    for number, request in enumerate(scoring):
        assert_teacher_forced(request, scored(events[number]))
    assert not any(scored(events[number]) for number in range(6, 12))


def test_others_keep_their_bits():
    """Tokens and log-probabilities of other requests are the same beside a request whose prompt is scored."""
    others = requests(5, seed=5, logprobs=1, sampling=SamplingParams(temperature=1, seed=9))
    alone = run(engine(), list(others))
    beside = run(engine(), [*others, *requests(5, seed=6, prompt_logprobs=3)])
    for number in range(5):
        assert [event.logprob for event in beside[number]] == [event.logprob for event in alone[number]]


def test_a_cached_prefix_and_a_preemption_change_nothing():
    [request] = requests(1, seed=8, prompt_logprobs=1)
    one = engine()
    run(one, [Request(request.prompt_ids, 4)])
    cached = one.stats().prefix_hit_tokens
    [events] = run(one, [request]).values()
    assert_teacher_forced(request, scored(events))
    assert one.stats().prefix_hit_tokens == cached
    many = requests(8, seed=11, prompt_logprobs=0)
    small = engine(blocks=30)
    for request, events in zip(many, run(small, list(many)).values(), strict=True):
        assert_teacher_forced(request, scored(events))
    assert small.stats().preemptions > 0


def test_without_new_tokens_the_prompt_alone_is_computed():
    prompt = tuple(3 + position % 300 for position in range(POSITIONS))  # as long as the model's positions
    blocks = POSITIONS // 4
    for request in (Request(prompt, 0, prompt_logprobs=1), Request(prompt[:1], 0, prompt_logprobs=0)):
        [events] = run(engine(blocks=blocks), [request]).values()
        last = events[-1]
        assert ids(events) == () and last.finish_reason == "length" and last.text == ""
        assert (last.usage.prompt, last.usage.completion) == (len(request.prompt_ids), 0)
        assert_teacher_forced(request, scored(events))
        answer = Answer.from_events(request, events)
        assert answer.ids == () and len(answer.prompt_logprobs) == len(request.prompt_ids) - 1


def test_the_stop_token_has_a_log_probability_of_its_own():
    prompt = tuple(range(40, 60))
    first = int(teacher_forced((*prompt, 3))[-1].argmax())
    request = Request(prompt, 5, stop_ids=frozenset({first}), logprobs=1)
    [events] = run(engine(), [request]).values()
    last = events[-1]
    assert last.finish_reason == "stop" and last.token is None and last.logprob is None
    assert last.stop_logprob.token == first
    assert last.stop_logprob.logprob == pytest.approx(float(teacher_forced((*prompt, 3))[-1].max()), abs=1e-5)


@pytest.mark.parametrize("new_tokens", [0, 1, 6])
def test_speculation_changes_nothing(new_tokens):
    scoring = [replace(request, max_new_tokens=new_tokens) for request in requests(3, seed=2, prompt_logprobs=2)]
    events = run(engine(speculate=True), [*scoring, *requests(3, seed=4)])
    for number, request in enumerate(scoring):
        assert_teacher_forced(request, scored(events[number]))
        assert len(ids(events[number])) == new_tokens


def test_logits_that_are_not_finite_end_that_request():
    broken = tiny_model(vocab_size=330, max_position_embeddings=96, rms_norm_eps=1.1e-6)  # no other test's
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    text_model = type(TEXT_MODEL)(broken, TEXT_MODEL.tokenizer, frozenset(), ())
    one = Engine(text_model, EngineLimits(cache_bytes=2**20))
    [events] = run(one, [Request((4, 5, 6), 0, prompt_logprobs=1)]).values()
    assert events[-1].finish_reason == "error" and "not finite" in events[-1].error
