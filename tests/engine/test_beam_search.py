"""Beam search: the texts of the plain search without a cache and of transformers, alone and in any batch."""

from dataclasses import replace

import pytest
import torch

from soli.engine.beam_search import BeamSearchParams, likeliest_continuations
from soli.engine.constraint import ConstraintSpec
from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for
from soli.engine.request import Answer, EngineLimits, RejectedRequest, Request
from soli.engine.sampler import SamplingParams
from soli.errors import SoliError
from tests.engine.oracle import beam_search, continuation
from tests.engine.tiny import SPARSE_KINDS, tiny_model, tiny_text_model

PROMPTS = [(5, 6, 7, 8, 9, 10, 11), (12,), (13, 14), (15, 16, 17, 18, 19), (20, 21, 22), tuple(range(30, 63))]
NEW = 20  # more than a block of the cache
TINY = tiny_text_model()
STOP = frozenset({3, 40})
PARAMS = [
    BeamSearchParams(4, 0.6),
    BeamSearchParams(3, 0.0),
    BeamSearchParams(2, 1.0, True),
    BeamSearchParams(5, 2.0, "never"),
    BeamSearchParams(3, -1.0, "never"),
]


def stop_ids(text_model, prompt, seed=0) -> frozenset[int]:
    """Tokens that end some texts of a search, soon and late."""
    searched = beam_search(text_model.model, prompt, NEW, BeamSearchParams(4, 0.6))
    return frozenset({searched[0][1][4 + seed], searched[-1][1][11]})


def request(prompt, params=PARAMS[0], stop_ids=STOP, new=NEW, **options) -> Request:
    return Request(prompt, new, stop_ids=frozenset(stop_ids), beam_search=params, **options)


def answers(text_model, requests, limits=None) -> list[Answer]:
    limits = limits or limits_for(text_model, 8, beam_width=max(one.sequences for one in requests))
    engine = Engine(text_model, limits)
    answered = [answer for answer in answer_all(engine, requests) if answer is not None]
    assert engine.stats().blocks_used == engine.stats().running == engine.stats().waiting == 0
    return answered


def assert_is_oracle_s(answer: Answer, text_model, one: Request) -> None:
    expected = beam_search(text_model.model, one.prompt_ids, one.max_new_tokens, one.beam_search, one.stop_ids)
    assert [hypothesis.ids for hypothesis in answer.hypotheses] == [ids for _, ids in expected]
    assert [one.score for one in answer.hypotheses] == pytest.approx([score for score, _ in expected], rel=1e-5)
    assert answer.ids == answer.hypotheses[0].ids and answer.text == answer.hypotheses[0].text
    assert answer.usage.completion == len(answer.ids)
    for hypothesis in answer.hypotheses:
        assert hypothesis.text == text_model.tokenizer.decode(hypothesis.ids)
        assert (hypothesis.finish_reason == "stop") or len(hypothesis.ids) == one.max_new_tokens


@pytest.mark.parametrize("kind", ["v3", "v2 by groups", "dense", *SPARSE_KINDS])
def test_a_search_is_the_one_without_a_cache(kind):
    text_model = tiny_text_model(kind)
    for prompt, params in zip(PROMPTS, [*PARAMS, PARAMS[0]], strict=True):
        one = request(prompt, params, stop_ids(text_model, prompt))
        [answer] = answers(text_model, [one])
        assert_is_oracle_s(answer, text_model, one)


def test_in_a_batch_every_bit_is_as_alone():
    requests = [
        request(prompt, PARAMS[number % len(PARAMS)], stop_ids(TINY, prompt), NEW - number)
        for number, prompt in enumerate(PROMPTS)
    ]
    mixed = [*requests, Request(PROMPTS[0], NEW), Request(PROMPTS[1], NEW, SamplingParams(1.0, seed=1))]
    together = answers(TINY, mixed)
    assert [answer.hypotheses for answer in together] == [answers(TINY, [one])[0].hypotheses for one in mixed]
    assert all(len(answer.hypotheses) == one.sequences for one, answer in zip(requests, together, strict=False))
    assert together[-1].ids == continuation(TINY.model, PROMPTS[1], NEW, SamplingParams(1.0, seed=1)).ids
    assert {one.finish_reason for answer in together[:6] for one in answer.hypotheses} == {"stop", "length"}


def test_one_beam_is_greedy_decoding():
    for prompt in PROMPTS:
        one = request(prompt, BeamSearchParams(1, 0.6), stop_ids(TINY, prompt))
        expected = continuation(TINY.model, prompt, NEW, stop_ids=one.stop_ids)
        [answer] = answers(TINY, [one])
        assert (answer.ids, answer.finish_reason) == (expected.ids, expected.finish_reason)


def test_transformers_finds_the_same_texts(tmp_path):
    transformers = pytest.importorskip("transformers")
    from soli.checkpoint import save_model

    model = tiny_model("v3", vocab_size=330, max_position_embeddings=96)
    save_model(model, tmp_path / "model", format="fp32")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for prompt, params in zip(PROMPTS, [*PARAMS, PARAMS[0]], strict=True):
        ends = stop_ids(TINY, prompt)
        output = peer.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=sorted(ends),
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        [answer] = answers(TINY, [request(prompt, params, ends)])
        assert [one.score for one in answer.hypotheses] == pytest.approx(output.sequences_scores.tolist(), rel=1e-5)
        for hypothesis, sequence in zip(answer.hypotheses, output.sequences.tolist(), strict=True):
            assert tuple(sequence[len(prompt) :][: len(hypothesis.ids)]) == hypothesis.ids


def test_equal_sums_go_to_the_lower_token_and_the_lower_beam():
    logits_NV = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    first, second = likeliest_continuations(logits_NV, [0.0, -1.0], 2)
    assert [token for _, token in first] == [1, 2, 4] and [token for _, token in second] == [0, 1, 2, 3, 4]
    model = tiny_model("v3", vocab_size=331, max_position_embeddings=96)
    tied = replace(TINY, model=model)
    with torch.no_grad():
        model.lm_head.weight[200:260] = model.lm_head.weight[100:160]  # each token has an equal one
    one = request(PROMPTS[0], BeamSearchParams(6, 0.6), ())
    [answer] = answers(tied, [one])
    assert_is_oracle_s(answer, tied, one)


def test_preempted_beams_find_the_same_texts():
    requests = [request(prompt, new=40) for prompt in PROMPTS[:4]]
    expected = [[one.ids for one in answer.hypotheses] for answer in answers(TINY, requests)]
    blocks = 4 * 3 + 2  # a search alone needs three of each beam, four run
    block_bytes = limits_for(TINY, 1, 16).cache_bytes
    for sharing in (False, True):
        limits = EngineLimits(
            cache_bytes=blocks * block_bytes, max_running=16, tokens_per_step=64, prefix_sharing=sharing
        )
        engine = Engine(TINY, limits)
        results = [answer for answer in answer_all(engine, requests) if answer is not None]
        assert [[one.ids for one in answer.hypotheses] for answer in results] == expected
        assert engine.stats().preemptions > 0 and engine.stats().blocks_used == 0


def test_few_slots_are_waited_for():
    requests = [request(prompt) for prompt in PROMPTS]
    limits = replace(limits_for(TINY, 8, beam_width=4), max_running=5)
    mixed = [one for search in requests for one in (search, Request(search.prompt_ids, 3))]
    results = answers(TINY, mixed, limits)
    expected = answers(TINY, requests)
    assert [answer.hypotheses for answer in results[::2]] == [answer.hypotheses for answer in expected]


def test_shared_blocks_are_few():
    prompt = tuple(range(3, 3 + 64))
    engine = Engine(TINY, limits_for(TINY, 1, beam_width=4))
    engine.add(request(prompt, stop_ids=(), new=12))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.stats().blocks_used)
    assert most == 4 + 4, "four blocks of the prompt, and one of each beam"


def test_a_hooked_model_is_searched_eagerly():
    text_model = replace(TINY, model=tiny_model("v3", vocab_size=332, max_position_embeddings=96))
    calls = []
    handle = text_model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        one = request(PROMPTS[0])
        [answer] = answers(text_model, [one])
        assert calls
        assert_is_oracle_s(answer, text_model, one)
    finally:
        handle.remove()


def test_an_engine_that_drafts_searches_without_drafts():
    one = request(PROMPTS[0])
    engine = Engine(TINY, limits_for(TINY, 2, speculate=True, beam_width=4))
    results = [answer for answer in answer_all(engine, [one, Request(PROMPTS[1], NEW)]) if answer is not None]
    assert [answer.hypotheses for answer in results] == [
        answer.hypotheses for answer in answers(TINY, [one, Request(PROMPTS[1], NEW)])
    ]
    assert results[0].usage.drafted == 0 < results[1].usage.drafted


@pytest.mark.parametrize("kind", ["v3", "dense"])
def test_the_trace_is_that_of_the_best_text(kind):
    text_model = tiny_text_model(kind)
    one = request(PROMPTS[0], stop_ids=stop_ids(text_model, PROMPTS[0]), trace=True)
    [answer] = answers(text_model, [one])
    for hypothesis in answer.hypotheses:
        last = len(hypothesis.ids) - (hypothesis.finish_reason == "length")
        expected = text_model.model.backbone(torch.tensor([[*one.prompt_ids, *hypothesis.ids[:last]]])).routing
        assert hypothesis.routing is not None and len(hypothesis.routing) == len(expected)
        for mine, whole in zip(hypothesis.routing, expected, strict=True):
            assert torch.equal(mine.expert_ids_TK, whole.expert_ids_TK)
    assert len(answer.routing) == len(answer.hypotheses[0].routing)


def test_a_search_is_cancelled_and_fails_as_a_whole():
    engine = Engine(TINY, limits_for(TINY, 1, beam_width=4))
    for steps in (0, 1, 3):
        number = engine.add(request(PROMPTS[0]))
        for _ in range(steps):
            assert engine.step() == []
        engine.cancel(number)
        [event] = engine.step()
        assert event.finish_reason == "cancelled" and engine.stats().blocks_used == engine.stats().running == 0
    broken = replace(TINY, model=tiny_model("v3", vocab_size=333, max_position_embeddings=96))
    with torch.no_grad():
        broken.model.lm_head.weight[7] = float("nan")
    with pytest.raises(SoliError, match="not finite"):
        answers(broken, [request(PROMPTS[0])])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beam_width": 0}, "beam_width is 0"),
        ({"beam_width": -1}, "beam_width is -1"),
        ({"beam_width": 2.5}, "beam_width is 2.5"),
        ({"beam_width": True}, "beam_width is True"),
        ({"beam_width": 10**30}, "too large"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"length_penalty": float("inf")}, "length_penalty is inf"),
        ({"length_penalty": 1000}, "length_penalty is 1000"),
        ({"length_penalty": "1"}, "length_penalty is '1'"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
    ],
)
def test_parameters_out_of_range_are_rejected_by_name(values, message):
    with pytest.raises(SoliError, match=message):
        BeamSearchParams(**{"beam_width": 4, **values})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": SamplingParams(0.5)}, "temperature"),
        ({"sampling": SamplingParams(repetition_penalty=1.2)}, "penalties"),
        ({"stop": ("a",)}, "stop"),
        ({"logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"constraint": ConstraintSpec.regex("a")}, "constraint"),
        ({"min_new_tokens": 1}, "min_new_tokens"),
        ({"params": BeamSearchParams(9)}, "at most 8 sequences"),
        ({"params": BeamSearchParams(2), "new": 80}, "in each of 2 beams, but the cache"),
    ],
)
def test_requests_that_cannot_be_searched_are_rejected_by_name(options, message):
    limits = replace(limits_for(TINY, 1), max_running=8)
    engine = Engine(TINY, limits)
    with pytest.raises(RejectedRequest, match=message) as raised:
        engine.add(request(PROMPTS[0], **options))
    assert raised.value.field in ("beam_search", "max_new_tokens") and not engine.has_work


def test_more_beams_than_a_text_has_continuations_are_rejected():
    limits = replace(limits_for(TINY, 1), max_running=200, tokens_per_step=200)
    with pytest.raises(RejectedRequest, match="a text has at most 110 beams"):
        Engine(TINY, limits).add(request((5,), BeamSearchParams(111), new=2))
    one = request((5,), BeamSearchParams(110), new=2)
    [answer] = answers(TINY, [one])
    assert_is_oracle_s(answer, TINY, one)
