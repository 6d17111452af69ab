"""Replayed traces: the best possible is the best, the store has the hits that are predicted, bad traces are named."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from soli.cli import main
from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for
from soli.engine.request import Request
from soli.engine.text_model import text_model
from soli.errors import SoliError
from soli.experts.load import load_paged_model
from soli.experts.policy import POLICIES
from soli.experts.replay import BELADY, gained, replay
from soli.experts.trace import ExpertTrace, read_expert_trace
from tests.engine.tiny import tiny_tokenizer
from tests.experts.folders import E, K, mixture_folder
from tests.kernels.weights import needs_kernels


def random_trace(T, L, experts, chosen, seed) -> ExpertTrace:
    rng = np.random.default_rng(seed)
    weights = rng.gumbel(size=(T, L, experts)) - 2 * np.log(1 + np.arange(experts))
    return ExpertTrace(np.argsort(-weights, axis=2)[:, :, :chosen].astype(np.int64), experts, 1000)


def fewest_misses(trace: ExpertTrace, capacity: int) -> int:
    """By trying every eviction."""
    best: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    for ids_LK in trace.expert_ids_TLK:
        for layer, ids_K in enumerate(ids_LK.tolist()):
            chosen = frozenset((layer, expert) for expert in ids_K)
            following: dict[frozenset[tuple[int, int]], int] = {}
            for cached, misses in best.items():
                others = cached - chosen
                excess = max(0, len(others) + len(chosen) - capacity)
                for evicted in itertools.combinations(sorted(others), excess):
                    contents = frozenset((others - set(evicted)) | chosen)
                    total = misses + len(chosen - cached)
                    following[contents] = min(total, following.get(contents, total))
            best = following
    return min(best.values())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), capacity=st.integers(2, 7))
def test_no_order_of_evictions_has_fewer_misses_than_belady(seed, capacity) -> None:
    trace = random_trace(7, 2, 4, 2, seed)
    result = replay(trace, BELADY, capacity)
    assert result.uses - result.hits == fewest_misses(trace, capacity)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), capacity=st.integers(3, 60), name=st.sampled_from([*POLICIES]))
def test_no_policy_has_more_hits_than_belady(seed, capacity, name) -> None:
    trace = random_trace(60, 3, 20, 3, seed)
    result, best = replay(trace, name, capacity), replay(trace, BELADY, capacity)
    assert result.hits <= best.hits
    assert result.bytes_per_token == pytest.approx((result.uses - result.hits) / 60 * 1000)
    if capacity == 60:
        assert result.uses - result.hits == len(np.unique(trace.expert_ids_TLK + 20 * np.arange(3)[None, :, None]))


@needs_kernels
@pytest.mark.parametrize("policy", [*POLICIES])
def test_the_store_has_the_hits_that_are_predicted(policy) -> None:
    """A prompt of one token, then greedy decoding: each layer of each token is a step."""
    model, store = load_paged_model(mixture_folder("int8"), 20, mtp=False, policy=policy, prefetch="off")
    together = text_model(model, tiny_tokenizer())
    engine = Engine(together, limits_for(together, 1, 100))
    [answer] = answer_all(engine, [Request((17,), 60, trace=True)])
    assert answer is not None and answer.routing is not None
    ids = np.stack([layer.expert_ids_TK.numpy() for layer in answer.routing], axis=1)
    result = replay(ExpertTrace(ids, E), policy, 20)
    assert (store.stats.hits, store.stats.misses) == (result.hits, result.uses - result.hits)
    store.close()


def test_leaving_out_tokens_counts_the_others() -> None:
    trace = random_trace(40, 2, 8, 2, 0)
    for policy in (*POLICIES, BELADY):
        whole, part = replay(trace, policy, 6), replay(trace, policy, 6, skip=30)
        assert part.uses == 40
        assert part.hits <= whole.hits


def test_what_a_policy_gains() -> None:
    assert gained(0.6, 0.5, 0.7) == pytest.approx(0.5)
    assert gained(1.0, 1.0, 1.0) is None


def test_a_trace_is_read_back(tmp_path) -> None:
    trace = random_trace(5, 2, 300, 3, 0)
    trace.save(tmp_path / "trace")
    again = read_expert_trace(tmp_path / "trace")
    np.testing.assert_array_equal(again.expert_ids_TLK, trace.expert_ids_TLK)
    assert (again.experts, again.expert_bytes) == (300, 1000)


def arrays(**changes):
    ids = np.array([[[0, 1], [1, 2]]], np.uint16)
    return {"expert_ids": ids, "experts": np.array(4), "expert_bytes": np.array(10)} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no trace"),
        (b"abc", "no trace"),
        (save({"x": np.array(1)}), "must have the integers"),
        (save(arrays(expert_ids=np.zeros((1, 1, 1)))), "must have the integers"),
        (save(arrays(experts=np.array(2))), r"experts 0 \.\.\. 2 of 2"),
        (save(arrays(experts=np.array(2**40))), "cannot be of"),
        (save(arrays(expert_bytes=np.array(-1))), "cannot be of"),
        (save(arrays(experts=np.array([4]))), "single numbers"),
        (save(arrays(expert_ids=np.array([[[1, 1]]]))), "twice"),
        (save(arrays(expert_ids=np.zeros((0, 2, 2), np.int64))), "shape"),
        (save(arrays(expert_ids=np.array(3))), "shape"),
        (b"[]", "none"),
        (b'{"experts": 5}', "not a list"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path, content, message) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(SoliError, match=f"bad: .*{message}"):
        read_expert_trace(tmp_path / "bad")


@pytest.fixture(scope="module")
def nano_trace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    (folder / "texts.txt").write_text("He drank a cup of tea.\n他是我的朋友。\nGood morning.\n", encoding="utf-8")
    command = ["experts", "record", "nano", str(folder / "texts.txt"), "--out", str(folder / "trace")]
    assert main([*command, "--max-tokens", "20"]) == 0
    return folder / "trace"


def test_the_command_replays_what_it_recorded(nano_trace, capsys) -> None:
    command = ["experts", "replay", str(nano_trace), "--cache", "1MB,50%", "--disk", "1GB/s", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tokens"], result["layers"], result["chosen"], result["experts"]) == (20, 4, 4, 32)
    for size in result["sizes"]:
        assert [row["policy"] for row in size["policies"]] == [*POLICIES, BELADY]
        for row in size["policies"]:
            assert row["seconds_per_token"] == pytest.approx(row["bytes_per_token"] / 1e9)
    assert result["sizes"][1]["slots"] == 64
    assert main(command[:-1]) == 0
    assert "belady (the best possible)" in capsys.readouterr().out


def test_a_trace_of_the_json_of_generate_is_replayed(tmp_path, capsys) -> None:
    assert main(["generate", "nano", "Good morning", "--max-new-tokens", "8", "--experts", "--json"]) == 0
    (tmp_path / "trace.json").write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["experts", "replay", str(tmp_path / "trace.json"), "--cache", "2MB", "--model", "nano", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == 32
    assert main(["experts", "replay", str(tmp_path / "trace.json"), "--cache", "2MB"]) == 1
    assert "give --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache", "0%"], "above 0 %"),
        (["--cache", "101%"], "above 0 %"),
        (["--cache", "nan%"], "above 0 %"),
        (["--cache", "1B"], "room for 0"),
        (["--cache", "25%,"], "give a size"),
        (["--cache", "25%", "--disk", "fast"], "--disk is 'fast'"),
        (["--cache", "25%", "--skip", "20"], "leave out fewer"),
    ],
)
def test_what_cannot_be_replayed_is_one_sentence(nano_trace, options, message, capsys) -> None:
    assert main(["experts", "replay", str(nano_trace), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_another_models_trace_is_rejected(tmp_path, capsys) -> None:
    random_trace(5, 2, 64, K, 0).save(tmp_path / "trace")
    assert main(["experts", "replay", str(tmp_path / "trace"), "--cache", "50%", "--model", "nano"]) == 1
    assert "give the model that the trace is of" in capsys.readouterr().err
