"""Speculation in the engine: greedy text unchanged, seeds hold, drafts counted, KV blocks hold the module's latents."""

import pytest
import torch

from soli.engine.engine import Engine
from soli.engine.request import EngineLimits, Request
from soli.engine.sampler import SamplingParams
from soli.engine.text_model import open_text_model
from soli.errors import SoliError
from tests.engine.test_engine import TEXT_MODEL, ids, lone, requests, run
from tests.engine.tiny import tiny_model, tiny_tokenizer

A_TOKEN = 4 * 24 * 4  # three layers and the MTP module's, 16 + 8 values, float32


def engine(blocks: int = 200, **limits: object) -> Engine:
    settings = {"max_running": 16, "tokens_per_step": 40, "block_size": 4, "speculate": True, **limits}
    return Engine(TEXT_MODEL, EngineLimits(cache_bytes=blocks * 4 * A_TOKEN, **settings))


@pytest.mark.parametrize("limits", [{}, {"blocks": 40}, {"blocks": 30, "tokens_per_step": 16}])
def test_greedy_text_is_that_without_drafts(limits):
    batch = requests(16, seed=11)
    tested = engine(**limits)
    events_by_request = run(tested, {3 * n: [request] for n, request in enumerate(batch)})
    assert [ids(events_by_request[number]) for number in range(16)] == [lone(request) for request in batch]
    stats = tested.stats()
    assert 0 < stats.accepted < stats.drafted
    assert stats.completion_tokens == sum(len(ids(events)) for events in events_by_request.values())
    assert stats.drafted == sum(events_by_request[n][-1].usage.drafted for n in events_by_request)
    assert (stats.preemptions > 0) == (limits.get("blocks", 200) < 100)


def test_a_seed_gives_the_same_text_alone_beside_others_and_preempted():
    batch = [
        Request(one.prompt_ids, one.max_new_tokens, SamplingParams(0.8, top_k=5, seed=n))
        for n, one in enumerate(requests(12, seed=12))
    ]
    alone = [ids(run(engine(), [request])[0]) for request in batch]
    for limits in ({}, {"blocks": 30}):
        tested = engine(**limits)
        events_by_request = run(tested, batch)
        assert [ids(events_by_request[number]) for number in range(12)] == alone
    assert tested.stats().preemptions > 0


def test_shared_blocks_hold_the_modules_latents_too():
    prefix = tuple(range(10, 50))
    batch = [Request((*prefix, 60 + n, 70), 20) for n in range(2)]
    apart = [run(engine(), [request])[0] for request in batch]
    tested = engine()
    together = run(tested, batch[:1]) | run(tested, batch[1:])
    for number in range(2):
        assert ids(together[number]) == ids(apart[number])
        # Other latents would give other drafts.
        assert together[number][-1].usage.accepted == apart[number][-1].usage.accepted
    assert together[1][-1].usage.cached == 40 - 4 * (batch[1].prompt_ids[40] != batch[0].prompt_ids[40])


def test_a_trace_holds_no_draft_that_was_rejected():
    [request] = [Request(tuple(range(20, 40)), 16, trace=True)]
    tested = engine()
    [events] = run(tested, [request]).values()
    read = [*request.prompt_ids, *ids(events)]
    with torch.no_grad():
        whole = TEXT_MODEL.model.backbone(torch.tensor([read])).routing[0]
    traced_TK = torch.cat([event.routing[0].expert_ids_TK for event in events if event.routing])
    assert len(traced_TK) in (len(read) - 1, len(read))
    assert torch.equal(traced_TK, whole.expert_ids_TK[: len(traced_TK)])


def test_the_bundled_model_gains_tokens():
    model = open_text_model("nano", mtp=True)
    prompt = tuple(model.tokenizer.translation_prompt("Open the file and save it under another name.", "zh"))
    request = Request(prompt, 24, stop_ids=model.stop_ids)
    plain, drafting = (
        Engine(model, EngineLimits(cache_bytes=2**24, speculate=speculate)) for speculate in (False, True)
    )
    assert ids(run(plain, [request])[0]) == ids(run(drafting, [request])[0])
    assert drafting.stats().accepted > 0 and drafting.stats().steps < plain.stats().steps


def test_a_model_without_the_module_says_so():
    from soli.engine.text_model import text_model

    model = text_model(tiny_model("dense", vocab_size=330, max_position_embeddings=96), tiny_tokenizer())
    with pytest.raises(SoliError, match="no MTP module"):
        Engine(model, EngineLimits(speculate=True))
