"""The engine: a request's answer is the same alone, among others, after a preemption and behind a shared prefix."""

import random

import pytest
import torch

from soli.analysis.trace import trace_layer
from soli.engine.constraint import ConstraintSpec
from soli.engine.engine import Engine
from soli.engine.latent_cache import bytes_per_token
from soli.engine.request import EngineLimits, Event, QueueFull, Request
from soli.engine.sampler import SamplingParams
from soli.errors import SoliError
from soli.model.router import join_routing
from tests.engine.oracle import continuation
from tests.engine.tiny import KINDS, tiny_text_model

TEXT_MODEL = tiny_text_model()
VOCAB, POSITIONS = 330, 96
A_TOKEN = bytes_per_token(TEXT_MODEL.model.config, 3, torch.float32)


def engine(blocks: int = 200, block_size: int = 4, **limits: object) -> Engine:
    settings = {"max_running": 16, "tokens_per_step": 32, **limits}
    cache_bytes = blocks * block_size * A_TOKEN
    return Engine(TEXT_MODEL, EngineLimits(cache_bytes=cache_bytes, block_size=block_size, **settings))


def requests(count: int, seed: int = 0, **options: object) -> list[Request]:
    random_ = random.Random(seed)
    lengths = [random_.randint(1, 60) for _ in range(count)]
    return [
        Request(tuple(random_.randrange(3, VOCAB) for _ in range(length)), random_.randint(1, 30), **options)
        for length in lengths
    ]


def run(engine: Engine, arrivals: dict[int, list[Request]] | list[Request]) -> dict[int, list[Event]]:
    """Steps until all is done; requests arrive at the steps that `arrivals` says. The events of each, by number."""
    arrivals = {0: list(arrivals)} if isinstance(arrivals, list) else dict(arrivals)
    events: dict[int, list[Event]] = {}
    step = 0
    while arrivals or engine.has_work:
        for request in arrivals.pop(step, []):
            events[engine.add(request)] = []
        for event in engine.step():
            events[event.request_id].append(event)
        assert engine.stats().blocks_used <= engine.stats().blocks_total
        step += 1
        assert step < 5000, "the engine does not come to an end"
    assert engine.stats().blocks_used == engine.stats().running == engine.stats().waiting == 0
    return events


def ids(events: list[Event]) -> tuple[int, ...]:
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
    return tuple(event.token for event in events if event.token is not None)


def lone(request: Request) -> tuple[int, ...]:
    """The oracle's answer: no engine, no cache, no other request."""
    model, limit = TEXT_MODEL.model, request.max_new_tokens
    return continuation(model, request.prompt_ids, limit, request.sampling, request.stop_ids).ids


@pytest.mark.parametrize("limits", [{}, {"blocks": 60}, {"blocks": 26, "tokens_per_step": 16}, {"max_running": 3}])
def test_answers_are_those_of_a_request_alone(limits):
    batch = requests(24)
    arrivals: dict[int, list[Request]] = {}
    for number, request in enumerate(batch):
        arrivals.setdefault(3 * (number // 2), []).append(request)
    tested = engine(**limits)
    events_by_request = run(tested, arrivals)
    assert [ids(events_by_request[number]) for number in range(24)] == [lone(request) for request in batch]
    assert (tested.stats().preemptions > 0) == (limits.get("blocks", 200) < 100)
    for number, request in enumerate(batch):
        usage = events_by_request[number][-1].usage
        assert (usage.prompt, usage.completion) == (len(request.prompt_ids), len(ids(events_by_request[number])))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind):
    model = tiny_text_model(kind)
    batch = requests(6, seed=1)
    events_by_request = run(Engine(model, EngineLimits(cache_bytes=2**20, block_size=4, tokens_per_step=24)), batch)
    whole = [continuation(model.model, one.prompt_ids, one.max_new_tokens).ids for one in batch]
    assert [ids(events_by_request[number]) for number in range(6)] == whole


def test_seeds_hold_beside_others_and_over_preemptions():
    batch = [
        Request(request.prompt_ids, request.max_new_tokens, SamplingParams(1.2, top_k=20, seed=number))
        for number, request in enumerate(requests(16, seed=2))
    ]
    tested = engine(blocks=26)
    events_by_request = run(tested, batch)
    assert tested.stats().preemptions > 0
    assert [ids(events_by_request[number]) for number in range(16)] == [lone(request) for request in batch]


def test_a_cached_prefix_is_not_computed_again():
    prefix = tuple(range(10, 51))
    batch = [Request((*prefix, 60 + n), 8) for n in range(3)]
    tested = engine()
    first = run(tested, batch[:1])
    read = tested.stats().prompt_tokens
    rest = run(tested, batch[1:])
    events_by_request = first | rest
    assert [ids(events_by_request[number]) for number in range(3)] == [lone(request) for request in batch]
    assert [events_by_request[number][-1].usage.cached for number in range(3)] == [0, 40, 40]
    assert tested.stats().prefix_hit_tokens == 80
    assert (read, tested.stats().prompt_tokens) == (42, 42 + 2 + 2)
    masked_experts = Request(batch[0].prompt_ids, 4, masked_experts=frozenset({(1, 3)}))
    assert run(tested, [masked_experts])[3][-1].usage.cached == 0, "other experts computed these latents"


def test_a_long_prompt_never_stalls_the_others():
    tested = engine(tokens_per_step=16, max_running=4)
    tested.add(Request((5, 6), 60))
    tested.step()
    tested.add(Request(tuple(range(3, 73)), 2))
    for _ in range(5):
        events = tested.step()
        tokens = [event.token for event in events if event.request_id == 0 and event.token is not None]
        assert tokens, "a decoding request had to wait"
    assert sum(event.request_id == 1 for event in tested.step()) == 1


def test_cancelling_frees_blocks_before_the_next_step():
    tested = engine(blocks=12, prefix_sharing=False)
    numbers = [tested.add(Request(tuple(range(3, 23)), 10)) for _ in range(4)]
    tested.step()
    used = tested.stats().blocks_used
    tested.cancel(numbers[0]), tested.cancel(numbers[3])  # one that runs, one that waits
    assert tested.stats().blocks_used < used
    events = tested.step()
    assert {event.request_id for event in events if event.finish_reason == "cancelled"} == {numbers[0], numbers[3]}
    tested.cancel(numbers[0])
    while tested.has_work:
        assert all(event.request_id in numbers[1:3] for event in tested.step())


def test_an_error_ends_the_requests_of_its_step_alone(monkeypatch):
    tested = engine(max_running=1)
    bad, good = requests(2, seed=3)
    tested.add(bad), tested.add(good)
    with monkeypatch.context() as patched:
        patched.setattr(tested._runner.active, "forward", lambda *_: 1 / 0)
        [event] = tested.step()
    assert event.finish_reason == "error" and "ZeroDivisionError" in event.error
    events = [event for _ in range(60) for event in tested.step()]
    assert ids(events) == lone(good)


def test_stop_tokens_and_stop_strings_end_an_answer():
    [request] = requests(1, seed=5)
    request = Request(request.prompt_ids[:30], 30)
    whole = lone(request)
    stop = whole[7]
    [events] = run(engine(), [Request(request.prompt_ids, 30, stop_ids=frozenset({stop}))]).values()
    assert ids(events) == whole[: whole.index(stop)] and events[-1].finish_reason == "stop"
    text = TEXT_MODEL.tokenizer.decode(list(whole))
    word = text[len(text) // 2 :][:3]
    [events] = run(engine(), [Request(request.prompt_ids, 30, stop=(word,))]).values()
    assert "".join(event.text for event in events) == text[: text.index(word)]
    [events] = run(engine(), [request]).values()
    assert "".join(event.text for event in events) == text and events[-1].finish_reason == "length"


def test_a_trace_is_that_of_one_forward_even_over_preemptions():
    batch = requests(8, seed=4, trace=True)
    tested = engine(blocks=26)
    events_by_request = run(tested, batch)
    assert tested.stats().preemptions > 0
    for number, request in enumerate(batch):
        read = [*request.prompt_ids, *ids(events_by_request[number])][:-1]
        with torch.no_grad():
            whole = TEXT_MODEL.model.backbone(torch.tensor([read])).routing
        parts = zip(*(event.routing for event in events_by_request[number] if event.routing), strict=True)
        for mine, layer in zip(map(join_routing, parts), whole, strict=True):
            assert torch.equal(mine.expert_ids_TK, layer.expert_ids_TK)
            torch.testing.assert_close(mine.weights_TK, layer.weights_TK)


def test_a_masked_expert_is_not_selected_and_other_requests_are_not_masked():
    plain = Request(tuple(range(20, 50)), 12, trace=True)
    [events] = run(engine(), [plain]).values()
    load = join_routing([event.routing[0] for event in events if event.routing]).counts_E()
    busiest = int(load.argmax())
    masked_experts = Request(plain.prompt_ids, 12, trace=True, masked_experts=frozenset({(1, busiest), (2, 0)}))
    both = run(engine(), [plain, masked_experts])
    assert ids(both[0]) == ids(events)
    routing = join_routing([event.routing[0] for event in both[1] if event.routing])
    assert not (routing.expert_ids_TK == busiest).any() and load[busiest] > 0
    traced = trace_layer("layers.1", dict(TEXT_MODEL.model.moe_layers())["layers.1"].gate, routing)
    shown = [one.expert for token in traced for one in (*token.demoted_by_bias, *token.runner_ups, *token.selected)]
    assert busiest not in shown


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 3), "the prompt is empty"),
        (Request((5, 330), 3), "vocabulary ends at 329"),
        (Request((5,), 0), "ask for at least 1"),
        (Request((5,) * 90, 7), "only 96 positions"),
        (Request((5,) * 40, 10), "holds 10 blocks of 4"),
        (Request((5,), 1, masked_experts=frozenset({(0, 1)})), "layer 0 has no routed experts"),
        (Request((5,), 1, masked_experts=frozenset({(1, 16)})), "expert 16 of layer 1"),
        (Request((5,), 1, masked_experts=frozenset((1, e) for e in range(6))), "fewer than the 3 that are selected"),
        (Request((5,), 1, SamplingParams(logit_bias={330: 1.0})), "logit_bias names token 330"),
    ],
)
def test_what_could_never_run_is_rejected_at_once(request_, message):
    tested = engine(blocks=10)
    with pytest.raises(SoliError, match=message):
        tested.add(request_)
    assert not tested.has_work


def test_a_full_queue_says_so():
    tested = engine(max_running=1, max_waiting=2)
    tested.add(Request((5,), 3)), tested.step()
    tested.add(Request((5,), 3)), tested.add(Request((5,), 3))
    with pytest.raises(QueueFull, match="2 requests wait"):
        tested.add(Request((5,), 3))


def test_a_request_that_finds_a_free_slot_does_not_count_as_waiting():
    tested = engine(max_running=2, max_waiting=0)
    tested.add(Request((5,), 3)), tested.add(Request((6,), 3))  # no step between them
    with pytest.raises(QueueFull, match="0 requests wait"):
        tested.add(Request((7,), 3))
    assert {event.request_id for event in tested.step()} == {0, 1}


def test_a_constraint_holds_for_its_request_alone():
    plain = Request(tuple(range(20, 40)), 12)
    bound = Request(plain.prompt_ids, 12, stop_ids=frozenset({1}), constraint=ConstraintSpec.regex("(ab|ba){2}"))
    both = run(engine(), [plain, bound])
    text = "".join(event.text for event in both[1])
    assert text in {"abab", "abba", "baab", "baba"} and both[1][-1].finish_reason == "stop"
    assert ids(both[0]) == lone(plain)


def test_statistics_count_tokens_and_events():
    batch = requests(5, seed=6)
    tested = engine()
    events_by_request = run(tested, batch)
    stats = tested.stats()
    assert stats.prompt_tokens == sum(len(request.prompt_ids) for request in batch)
    assert stats.completion_tokens == sum(len(ids(events)) for events in events_by_request.values())
    read = stats.prompt_tokens + stats.completion_tokens - len(batch)
    assert [sum(layer) for layer in stats.expert_load] == [3 * read] * 2
    assert 0 < stats.cache_bytes <= 200 * 4 * A_TOKEN
