"""Decoding: the same tokens with and without cache, alone and in a batch, and a trace that is one forward's trace."""

import pytest
import torch

from soli.engine.generate import generate
from soli.engine.sampler import SamplingParams
from soli.errors import SoliError
from tests.engine.tiny import KINDS, tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14], [15, 16, 17, 18, 19], [20, 21, 22]]
NEW = 12


def greedy_by_hand(model, prompt: list[int], new: int, stop_ids=()) -> tuple[int, ...]:
    """The oracle: a whole forward for every token, one sequence, nothing of the engine."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
            if token in stop_ids:
                break
            ids.append(token)
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_same_with_and_without_cache_alone_and_in_a_batch(kind):
    model = tiny_model(kind)
    expected = [greedy_by_hand(model, prompt, NEW) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    for use_cache in (True, False):
        together = generate(model, PROMPTS, max_new_tokens=NEW, use_cache=use_cache)
        assert [one.ids for one in together] == expected
        assert all(one.finish_reason == "length" for one in together)
    alone = [generate(model, [prompt], max_new_tokens=NEW)[0].ids for prompt in PROMPTS]
    assert alone == expected


def test_rows_that_finish_leave_the_others_as_they_were():
    model = tiny_model()
    free = [greedy_by_hand(model, prompt, NEW) for prompt in PROMPTS]
    stop_ids = {free[0][2], free[3][5], free[4][0]}
    expected = [greedy_by_hand(model, prompt, NEW, stop_ids) for prompt in PROMPTS]
    assert len({len(ids) for ids in expected}) > 2
    found = generate(model, PROMPTS, max_new_tokens=NEW, stop_ids=stop_ids)
    assert [one.ids for one in found] == expected
    assert [one.finish_reason == "stop" for one in found] == [len(ids) < NEW for ids in expected]


def test_every_request_has_its_own_limit():
    model = tiny_model()
    limits = [3, 0, 7, 1, 5]
    found = generate(model, PROMPTS, max_new_tokens=limits)
    assert [one.ids for one in found] == [greedy_by_hand(model, p, n) for p, n in zip(PROMPTS, limits, strict=True)]


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch():
    model = tiny_model()
    params = [SamplingParams(0.9, seed=1), SamplingParams(), SamplingParams(1.5, top_k=5, seed=2)]
    params += [SamplingParams(1.0, top_p=0.7, seed=1), SamplingParams(2.0, seed=3)]
    together = generate(model, PROMPTS, max_new_tokens=NEW, sampling=params)
    for prompt, own, one in zip(PROMPTS, params, together, strict=True):
        assert generate(model, [prompt], max_new_tokens=NEW, sampling=own)[0].ids == one.ids
    other = generate(model, PROMPTS[:1], max_new_tokens=NEW, sampling=SamplingParams(0.9, seed=99))
    assert other[0].ids != together[0].ids


def test_on_token_sees_every_token_and_can_end_a_request():
    seen: dict[int, list[int]] = {0: [], 1: []}

    def on_token(request: int, token: int) -> bool:
        seen[request].append(token)
        return request == 0 and len(seen[0]) == 4

    found = generate(tiny_model(), PROMPTS[:2], max_new_tokens=NEW, on_token=on_token)
    assert [list(one.ids) for one in found] == [seen[0], seen[1]]
    assert [len(one.ids) for one in found] == [4, NEW]
    assert [one.finish_reason for one in found] == ["stop", "length"]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["v3", "v2 by groups", "v2 greedy"])
def test_the_trace_is_that_of_one_forward_over_the_tokens_read(kind, use_cache):
    model = tiny_model(kind)
    stop_ids = {greedy_by_hand(model, PROMPTS[0], NEW)[4]}
    found = generate(model, PROMPTS, max_new_tokens=NEW, stop_ids=stop_ids, trace=True, use_cache=use_cache)
    for prompt, one in zip(PROMPTS, found, strict=True):
        read = [*prompt, *one.ids] if one.finish_reason == "stop" else [*prompt, *one.ids[:-1]]
        with torch.no_grad():
            forward = model.backbone(torch.tensor([read])).routing
        assert one.routing is not None and len(one.routing) == len(forward) == 2
        for mine, whole in zip(one.routing, forward, strict=True):
            assert torch.equal(mine.expert_ids_TK, whole.expert_ids_TK)
            torch.testing.assert_close(mine.weights_TK, whole.weights_TK)
            torch.testing.assert_close(mine.biased_TE, whole.biased_TE)
            assert (mine.groups_TG is None) == (whole.groups_TG is None)
            assert int(mine.counts_E().sum()) == 3 * len(read)


def test_no_trace_unless_asked():
    assert generate(tiny_model(), [[5]], max_new_tokens=2)[0].routing is None


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_trace_of_a_dense_model_has_no_layers(use_cache):
    assert generate(tiny_model("dense"), [[5]], max_new_tokens=2, trace=True, use_cache=use_cache)[0].routing == ()


def test_a_text_may_fill_the_positions_to_the_last():
    model = tiny_model()
    prompt = list(range(3, 60))
    found = generate(model, [prompt, [7, 8]], max_new_tokens=[7, 3])
    assert found[0].ids == greedy_by_hand(model, prompt, 7)


@pytest.mark.parametrize(
    ("prompts", "new", "said"),
    [
        ([[5], []], 3, "prompt 2 is empty"),
        ([[5] * 60], 5, "60 tokens and asks for 5 more, but the model has only 64 positions"),
        ([[5, 97]], 1, "vocabulary"),
        ([[-1]], 1, "vocabulary"),
    ],
)
def test_refusals(prompts, new, said):
    with pytest.raises(SoliError, match=said):
        generate(tiny_model(), prompts, max_new_tokens=new)
