"""Sparse attention in the engine: an answer is that of the whole text at once, however it is cut, cached, drafted."""

import copy

import pytest
import torch

from soli.engine.engine import Engine
from soli.engine.latent_cache import bytes_per_token
from soli.engine.request import EngineLimits, Request
from soli.engine.runner import EagerRunner
from tests.engine.oracle import continuation
from tests.engine.shuffled_cache import ShuffledCache
from tests.engine.test_engine import ids, requests, run
from tests.engine.tiny import SPARSE_KINDS, tiny_model, tiny_text_model

KINDS = [*SPARSE_KINDS]


def sparse_engine(kind: str, blocks: int = 500, **limits: object) -> Engine:
    model = tiny_text_model(kind)
    cache_bytes = blocks * 4 * bytes_per_token(model.model.config, 3 + limits.get("speculate", False), torch.float32)
    return Engine(model, EngineLimits(cache_bytes=cache_bytes, block_size=4, max_running=6, **limits))


def answers(engine: Engine, batch: list[Request]) -> list[tuple[int, ...]]:
    return [ids(events) for events in run(engine, batch).values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limits", [{"tokens_per_step": 24}, {"tokens_per_step": 7}, {"blocks": 22}], ids=str)
@pytest.mark.parametrize("speculate", [False, True])
def test_answers_are_those_of_the_whole_text_at_once(kind, limits, speculate):
    batch = requests(6, seed=1)
    whole = [continuation(tiny_text_model(kind).model, one.prompt_ids, one.max_new_tokens).ids for one in batch]
    assert answers(sparse_engine(kind, **limits, speculate=speculate), batch) == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speculate", [False, True])
def test_a_prefix_hit_equals_a_cold_run(kind, speculate):
    prefix = tuple(range(10, 51))
    batch = [Request((*prefix, 60 + n), 8) for n in range(3)]
    warm = sparse_engine(kind, speculate=speculate)
    for request in batch:
        assert answers(warm, [request]) == answers(sparse_engine(kind, speculate=speculate), [request])
    assert warm.stats().prefix_hit_tokens == 80


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [(20,), (13, 7), (1,) * 20, (9, 1, 1, 4, 5)], ids=str)
def test_hidden_states_are_those_of_the_text_without_a_cache(kind, cut):
    """The selection does not depend on how a text is cut into steps; a decode token attends to gathered latents."""
    model = tiny_model(kind)
    ids_BT = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = model.backbone(ids_BT).hidden_BTD
        cache, parts, at = ShuffledCache(model, 3, 20, 3), [], 0
        for count in cut:
            step = cache.step([2, 0], [at] * 2, [count] * 2)
            output = EagerRunner(model).forward(ids_BT[:, at : at + count].flatten(), step.positions_T, step, [])
            parts.append(output.hidden_TD.view(2, count, -1))
            at += count
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_tokens_of_a_hooked_projection_attend_to_the_selection_too(kind):
    """They are expanded then, each with its own mask."""
    plain, hooked = tiny_model(kind), copy.deepcopy(tiny_model(kind))
    for block in hooked.layers:
        block.self_attn.kv_b_proj.register_forward_hook(lambda _module, _args, output: output.clone())
    ids_BT = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        hidden = []
        for model in (plain, hooked):
            cache = ShuffledCache(model, 2, 20, 3)
            for at, count in ((0, 17), (17, 3)):
                step = cache.step([0, 1], [at] * 2, [count] * 2)
                tokens = ids_BT[:, at : at + count].flatten()
                output = EagerRunner(model).forward(tokens, step.positions_T, step, [])
            hidden.append(output.hidden_TD)
    torch.testing.assert_close(*hidden, rtol=0, atol=2e-5)


@pytest.mark.parametrize("runner", ["eager", "auto"])
@pytest.mark.parametrize("prompt", [(5,) * 3, (3, 4, 5, *range(6, 30))], ids=len)
def test_a_model_that_computes_nan_ends_its_request_in_a_sentence(runner, prompt):
    model = copy.deepcopy(tiny_text_model("v3.2"))
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    engine = Engine(model, EngineLimits(cache_bytes=2**20, block_size=4), runner=runner)
    [events] = run(engine, [Request(prompt, 8)]).values()
    assert events[-1].finish_reason == "error" and "not finite" in events[-1].error


@pytest.mark.parametrize(("kind", "indexers"), [("v3.2", 4), ("glm with shared indexers", 3)])
def test_the_cache_holds_a_key_for_each_indexer(kind, indexers):
    config = tiny_model(kind).config
    layers = config.num_hidden_layers + 1  # with the MTP module
    each = bytes_per_token(config, layers, torch.float32)
    assert each == 4 * (layers * (16 + 8) + indexers * 12)
    engine = sparse_engine(kind, speculate=True)
    run(engine, requests(1))
    assert engine.stats().cache_bytes == engine.stats().blocks_total * 4 * each
