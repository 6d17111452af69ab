"""Sampling through the engine: a seed's text, penalised or constrained, is the same in any batch."""

import pytest

from soli.engine.constraint import ConstraintSpec
from soli.engine.engine import Engine
from soli.engine.request import EngineLimits, Request
from soli.engine.sampler import SamplingParams
from soli.engine.text_model import TextModel, open_text_model

KINDS = [
    SamplingParams(1.0, seed=4),
    SamplingParams(1.2, top_k=20, seed=-7, repetition_penalty=1.3),
    SamplingParams(0.8, top_p=0.9, seed=1, presence_penalty=1.0, frequency_penalty=0.4, logit_bias={300: 2.0}),
]
SPECS = [None, ConstraintSpec.regex("[0-9]{3}-[a-z]{4,9}"), ConstraintSpec.json_object()]


@pytest.fixture(scope="module")
def nano() -> TextModel:
    return open_text_model("nano")


def run(text_model: TextModel, requests: list[Request], limits: EngineLimits | None = None):
    """Tokens, log-probabilities and text of every request, and how often one was preempted."""
    engine = Engine(text_model, limits)
    results: dict[int, list] = {engine.add(request): [[], [], ""] for request in requests}
    while engine.has_work:
        for event in engine.step():
            tokens, logprobs, _ = results[event.request_id]
            tokens += [] if event.token is None else [event.token]
            logprobs += [] if event.logprob is None else [round(event.logprob.logprob, 3)]
            results[event.request_id][2] += event.text
            assert event.finish_reason in (None, "stop", "length"), event.error
    return list(results.values()), engine.stats().preemptions


def test_a_seed_s_text_is_the_same_alone_among_others_and_preempted(nano):
    prompt = tuple(nano.tokenizer.translation_prompt("The weather is fine today and we go out.", "zh"))
    requests = [
        Request(prompt, 14, params, nano.stop_ids, ("。",), logprobs=1, constraint=spec)
        for params in KINDS
        for spec in SPECS
    ]
    alone = [run(nano, [request])[0][0] for request in requests]
    assert len({text for _, _, text in alone}) > 6
    assert run(nano, requests)[0] == alone
    tight, preemptions = run(nano, requests, EngineLimits(cache_bytes=120_000))
    assert preemptions > 0 and tight == alone
