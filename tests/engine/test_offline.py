"""The engine without a thread: its answers are the oracle's, alone and in batches, in order, over a bounded window."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from soli.engine.constraint import ConstraintSpec
from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for, stream
from soli.engine.request import Answer, Request
from soli.engine.sampler import SamplingParams
from soli.engine.text_model import TextModel, open_text_model
from soli.errors import SoliError
from tests.engine.oracle import continuation
from tests.engine.tiny import KINDS, tiny_text_model

PROMPTS = [(5, 6, 7, 8, 9, 10, 11), (12,), (13, 14), (15, 16, 17, 18, 19), (20, 21, 22)]
NEW = 12
TINY = tiny_text_model()


def answers(text_model: TextModel, requests: list[Request], batch_size: int = 8) -> list[Answer]:
    engine = Engine(text_model, limits_for(text_model, batch_size))
    return [answer for answer in answer_all(engine, requests) if answer is not None]


def oracle(text_model: TextModel, request: Request):
    spec = request.constraint
    constraint = text_model.constraints().open(spec) if spec is not None else None
    return continuation(
        text_model.model, request.prompt_ids, request.max_new_tokens, request.sampling, request.stop_ids, constraint
    )


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_without_a_cache_alone_and_in_a_batch(kind):
    text_model = tiny_text_model(kind)
    requests = [Request(prompt, NEW) for prompt in PROMPTS]
    expected = [oracle(text_model, request).ids for request in requests]
    assert len(set(expected)) > 1
    together = answers(text_model, requests)
    assert [answer.ids for answer in together] == expected
    assert all(answer.finish_reason == "length" for answer in together)
    alone = [answers(text_model, [request])[0].ids for request in requests]
    assert alone == expected


def test_requests_that_finish_leave_the_others_as_they_were():
    free = [oracle(TINY, Request(prompt, NEW)).ids for prompt in PROMPTS]
    stop_ids = frozenset({free[0][2], free[3][5], free[4][0]})
    requests = [Request(prompt, NEW, stop_ids=stop_ids) for prompt in PROMPTS]
    expected = [oracle(TINY, request) for request in requests]
    assert len({len(one.ids) for one in expected}) > 2
    completed = answers(TINY, requests)
    assert [answer.ids for answer in completed] == [one.ids for one in expected]
    assert [answer.finish_reason for answer in completed] == [one.finish_reason for one in expected]


def test_every_request_has_its_own_limit():
    requests = [Request(prompt, limit) for prompt, limit in zip(PROMPTS, [3, 2, 7, 1, 5], strict=True)]
    assert [answer.ids for answer in answers(TINY, requests)] == [oracle(TINY, request).ids for request in requests]


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch():
    params = [SamplingParams(0.9, seed=1), SamplingParams(), SamplingParams(1.5, top_k=5, seed=2)]
    params += [SamplingParams(1.0, top_p=0.7, seed=1), SamplingParams(2.0, seed=3)]
    requests = [Request(prompt, NEW, sampling) for prompt, sampling in zip(PROMPTS, params, strict=True)]
    together = answers(TINY, requests)
    for request, answer in zip(requests, together, strict=True):
        assert answers(TINY, [request])[0].ids == answer.ids == oracle(TINY, request).ids
    [other] = answers(TINY, [Request(PROMPTS[0], NEW, SamplingParams(0.9, seed=99))])
    assert other.ids != together[0].ids


def test_nano_s_log_probabilities_and_constraints_are_the_oracle_s():
    nano = open_text_model("nano")
    prompt = tuple(nano.tokenizer.translation_prompt("The weather is fine today.", "zh"))
    kinds = [
        (SamplingParams(), None),
        (SamplingParams(0.8, seed=5, repetition_penalty=1.2, logit_bias={300: 1.0}), None),
        (SamplingParams(1.0, seed=6), ConstraintSpec.regex("[0-9]{2}-[a-z]{3,5}")),
    ]
    requests = [
        Request(prompt, NEW, sampling, nano.stop_ids, logprobs=2, constraint=constraint)
        for sampling, constraint in kinds
    ]
    for request, answer in zip(requests, answers(nano, requests), strict=True):
        expected = oracle(nano, request)
        assert (answer.ids, answer.finish_reason) == (expected.ids, expected.finish_reason)
        assert answer.logprobs is not None
        for mine, whole in zip(answer.logprobs, expected.logprobs, strict=True):
            assert mine.token == whole.token and mine.logprob == pytest.approx(whole.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in whole.top]


def test_an_answer_s_text_ends_before_a_stop_string():
    [answer] = answers(TINY, [Request(PROMPTS[0], 30)])
    assert answer.ids == oracle(TINY, Request(PROMPTS[0], 30)).ids
    assert answer.text == TINY.tokenizer.decode(answer.ids) and answer.finish_reason == "length"
    word = answer.text[len(answer.text) // 2 :][:3]
    [cut] = answers(TINY, [Request(PROMPTS[0], 30, stop=(word,))])
    assert cut.text == answer.text[: answer.text.index(word)] and cut.finish_reason == "stop"
    assert cut.ids == answer.ids[: len(cut.ids)]


@pytest.mark.parametrize("kind", ["v3", "v2 by groups", "v2 greedy"])
def test_the_trace_is_that_of_one_forward_pass_over_the_tokens_read(kind):
    text_model = tiny_text_model(kind)
    stop_ids = frozenset({oracle(text_model, Request(PROMPTS[0], NEW)).ids[4]})
    requests = [Request(prompt, NEW, stop_ids=stop_ids, trace=True) for prompt in PROMPTS]
    for request, answer in zip(requests, answers(text_model, requests), strict=True):
        expected = oracle(text_model, request)
        assert answer.routing is not None and len(answer.routing) == len(expected.routing) == 2
        for mine, whole in zip(answer.routing, expected.routing, strict=True):
            assert torch.equal(mine.expert_ids_TK, whole.expert_ids_TK)
            torch.testing.assert_close(mine.weights_TK, whole.weights_TK)
            torch.testing.assert_close(mine.biased_TE, whole.biased_TE)
            assert (mine.groups_TG is None) == (whole.groups_TG is None)
            assert int(mine.counts_E().sum()) == 3 * len(expected.tokens_read)


def test_no_trace_unless_requested_and_none_of_layers_in_a_dense_model():
    assert answers(TINY, [Request((5,), 2)])[0].routing is None
    assert answers(tiny_text_model("dense"), [Request((5,), 2, trace=True)])[0].routing == ()


def test_a_text_may_fill_the_positions_to_the_last():
    requests = [Request(tuple(range(3, 92)), 7), Request((7, 8), 3)]
    assert answers(TINY, requests)[0].ids == oracle(TINY, requests[0]).ids


@pytest.mark.parametrize("speculate", [False, True])
def test_a_batch_fits_into_its_cache_whatever_its_size(speculate):
    requests = [Request(tuple(range(3, 3 + n)), 96 - n) for n in (40, 3, 90, 60)]
    engine = Engine(TINY, limits_for(TINY, 4, 96, speculate=speculate))
    assert [answer.ids for answer in answer_all(engine, requests)] == [oracle(TINY, one).ids for one in requests]
    assert engine.stats().preemptions == 0 and engine.stats().blocks_total == 4 * 96 // engine.limits.block_size


def test_an_answer_does_not_wait_for_later_requests():
    completed: list[int] = []
    limits = [2, 2, 9, 3, 2]
    requests = [Request(prompt, limit) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    in_order = answer_all(Engine(TINY, limits_for(TINY, 2)), requests, on_answer=completed.append)
    next(in_order)
    assert sum(completed) == 2, "the first two ran together, and nobody waited for the third"
    assert len(list(in_order)) == 4 and sum(completed) == 5


def test_endless_requests_are_taken_as_they_can_run_and_at_most_a_window_of_them():
    taken = 0

    def endless() -> Iterator[Request | None]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield None if number % 3 == 1 else Request((5, 6), 2) if number else Request((5, 6), 60)

    in_order = answer_all(Engine(TINY, limits_for(TINY, 4)), endless(), window=6)
    first = next(in_order)
    assert first is not None and len(first.ids) == 60 and taken == 6, "the first answer is the slowest"
    assert next(in_order) is None and len(next(in_order).ids) == 2


def test_what_comes_before_a_request_that_is_rejected_or_fails_is_answered():
    engine = Engine(TINY, limits_for(TINY, 2))
    for bad in (Request((), 3), Request((5,) * 90, 8)):
        before = []
        with pytest.raises(SoliError, match="the prompt"):
            for answer in answer_all(engine, [Request((5,), 20), Request((6,), 2), bad, Request((7,), 2)]):
                before.append(answer)
        assert [len(answer.ids) for answer in before] == [20, 2]
    assert engine.stats().running == engine.stats().waiting == 0


def test_answers_that_are_not_waited_for_are_cancelled():
    engine = Engine(TINY, limits_for(TINY, 2))
    in_order = answer_all(engine, [Request((5,), 2), Request((6,), 60)])
    next(in_order)
    in_order.close()
    pieces = stream(engine, Request((5,), 60))
    next(pieces)
    pieces.close()
    assert engine.stats().running == 0 == engine.stats().blocks_used
    [answer] = answer_all(engine, [Request((8,), 3)])
    assert answer.ids == oracle(TINY, Request((8,), 3)).ids


def test_a_stream_s_pieces_are_its_answer():
    request = Request(PROMPTS[0], NEW, logprobs=1, trace=True)
    engine = Engine(TINY, limits_for(TINY, 1, 19))
    events = list(stream(engine, request))
    assert len(events) >= NEW and events[-1].finish_reason == "length"
    answer = Answer.from_events(request, events)
    assert answer.ids == oracle(TINY, request).ids and answer.text == "".join(event.text for event in events)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 3), "the prompt is empty"),
        (Request((5,) * 92, 5), "92 tokens and asks for 5 more, but the model has only 96 positions"),
        (Request((5, 330), 1), "vocabulary"),
        (Request((-1,), 1), "vocabulary"),
        (Request((5,), 0), "at least 1"),
    ],
)
def test_rejections(request_, message):
    with pytest.raises(SoliError, match=message):
        answers(TINY, [request_])
