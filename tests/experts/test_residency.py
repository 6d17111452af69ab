"""Where each selected expert was when its layer needed it, and what reading cost: as many misses, bytes and
milliseconds as the store counts, through every runner, slice and batch; nothing of it for a model in memory."""

import json
import time
from collections import Counter
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from soli.analysis.residency import TIERS
from soli.analysis.trace import PagedExpert, PagedLayerTrace, TokenTrace, read_trace, trace_tokens
from soli.cli import app
from soli.engine.engine import Engine
from soli.engine.layer_table import FusedLayers
from soli.engine.offline import answer_all, limits_for
from soli.engine.request import Request
from soli.engine.runner import RunnerName
from soli.engine.text_model import text_model
from soli.experts.load import load_paged_model
from soli.kernels import Dispatch
from soli.model import Transformer
from soli.model.layers import set_backend
from tests.engine.tiny import tiny_tokenizer
from tests.experts.folders import LAYERS, E, K, mixture_folder, requests, resident_model
from tests.kernels.weights import needs_kernels

ALL = (LAYERS - 1) * E  # experts without the MTP module's


def traces(model: Transformer, prompts: list[Request], runner: RunnerName = "fused") -> list[list[TokenTrace]]:
    together = text_model(model, tiny_tokenizer())
    engine = Engine(together, limits_for(together, len(prompts), 250), runner=runner)
    routers = [(name, moe.gate) for name, moe in model.moe_layers()]
    answers = answer_all(engine, [replace(prompt, trace=True) for prompt in prompts])
    return [
        trace_tokens(routers, answer.routing or (), [*answer.prompt_ids, *answer.ids], ["x"] * 300, 1)
        for answer in answers
        if answer is not None
    ]


def paged_layers(traces: list[list[TokenTrace]]) -> list[PagedLayerTrace]:
    layers = [layer for trace in traces for token in trace for layer in token.layers]
    assert all(isinstance(layer, PagedLayerTrace) for layer in layers)
    return [layer for layer in layers if isinstance(layer, PagedLayerTrace)]


def tiers(layers: list[PagedLayerTrace]) -> Counter[str]:
    return Counter(expert.tier for layer in layers for expert in layer.selected)


@needs_kernels
@pytest.mark.parametrize("runner", ["fused", "eager"])
def test_the_first_tokens_experts_are_on_disk_and_then_in_memory(runner) -> None:
    model, store = load_paged_model(mixture_folder("bf16"), ALL, mtp=False, prefetch="off")
    first, second = (paged_layers(traces(model, requests((1,), 1), runner)) for _ in range(2))
    assert tiers(first) == {"disk": 3 * K} and tiers(second) == {"memory": 3 * K}
    expert_bytes = int(store.layers[0].expert_bytes_E[0])
    assert [(layer.bytes_read, layer.pass_tokens) for layer in first] == [(K * expert_bytes, 1)] * 3
    assert all(layer.waited_ms > 0 for layer in first)
    assert [(layer.bytes_read, layer.waited_ms) for layer in second] == [(0, 0.0)] * 3
    store.close()


@needs_kernels
@settings(max_examples=8)
@given(
    capacity=st.integers(K, ALL),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    runner=st.sampled_from(["fused", "eager"]),
)
def test_bytes_and_waits_are_those_of_the_store(capacity, lengths, runner) -> None:
    """Each pass is in the traces once for each of its tokens, whatever it was sliced into."""
    model, store = load_paged_model(mixture_folder("int8"), capacity, mtp=False, prefetch="off")
    layers = paged_layers(traces(model, requests(lengths, 5), runner))
    assert sum(layer.bytes_read / layer.pass_tokens for layer in layers) == pytest.approx(store.reader.stats.bytes)
    waited = sum(layer.waited_ms / layer.pass_tokens for layer in layers)
    assert waited == pytest.approx(1000 * store.stats.waited_seconds, rel=0.02, abs=0.1)
    if lengths == [1]:
        assert tiers(layers)["disk"] == store.stats.misses
    store.close()


@needs_kernels
def test_experts_that_are_read_ahead_are_being_read(monkeypatch) -> None:
    model, store = load_paged_model(mixture_folder("bf16"), ALL // 2, mtp=False, prefetch="on")
    file = type(store.reader._files[0])
    read = file.read

    def read_slowly(self, *arguments) -> None:
        time.sleep(0.03)
        read(self, *arguments)

    monkeypatch.setattr(file, "read", read_slowly)
    layers = paged_layers(traces(model, requests((1,), 12)))
    counts = tiers(layers)
    assert counts["reading"] == store.prefetcher.stats.used > 0
    assert counts["disk"] == store.stats.misses and counts["memory"] > 0
    assert all((layer.waited_ms > 10) == any(expert.tier != "memory" for expert in layer.selected) for layer in layers)
    store.close()


def test_plain_torch_reports_them_too() -> None:
    model, store = load_paged_model(mixture_folder("fp8"), K, mtp=False)
    set_backend(model, Dispatch("torch"))
    layers = paged_layers(traces(model, requests((1,), 4), "eager"))
    assert tiers(layers)["disk"] == store.stats.misses and all(layer.waited_ms > 0 for layer in layers[:3])
    store.close()


@needs_kernels
@pytest.mark.parametrize("runner", ["fused", "eager"])
def test_a_model_in_memory_has_none(runner) -> None:
    trace = traces(resident_model("bf16", mtp=False), requests((3,), 2), runner)[0]
    assert not any(isinstance(layer, PagedLayerTrace) for token in trace for layer in token.layers)
    layer = json.loads(json.dumps(asdict(trace[0])))["layers"][0]
    assert not {"waited_ms", "bytes_read", "pass_tokens"} & layer.keys() and "tier" not in layer["selected"][0]


@needs_kernels
def test_the_trace_is_read_back() -> None:
    model, store = load_paged_model(mixture_folder("bf16"), K, mtp=False)
    trace = traces(model, requests((4,), 4))[0]
    tokens = json.loads(json.dumps([asdict(token) for token in trace]))
    assert read_trace(tokens) == trace
    assert isinstance(trace[0].layers[0].selected[0], PagedExpert)
    store.close()


@needs_kernels
def test_a_pass_in_several_calls_has_each_calls_cost() -> None:
    """Where scratch memory is short, a prompt is computed by several calls of the C++ kernels."""
    model, store = load_paged_model(mixture_folder("int8"), E, mtp=False, prefetch="off")
    whole = FusedLayers.__init__

    def in_parts(self, *arguments) -> None:
        whole(self, *arguments)
        self.max_tokens = 16

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedLayers, "__init__", in_parts)
        layers = paged_layers(traces(model, requests((40,), 1)))
    assert Counter(layer.pass_tokens for layer in layers) == {16: 3 * 32, 8: 3 * 8}
    assert sum(layer.bytes_read / layer.pass_tokens for layer in layers) == pytest.approx(store.reader.stats.bytes)
    store.close()


@needs_kernels
def test_the_command_line_has_tiers_and_marks() -> None:
    arguments = ["translate", "He drank a cup of tea.", "--memory", "12MB"]
    result = CliRunner().invoke(app, [*arguments, "--experts", "--json"])
    assert result.exit_code == 0, result.output
    layer = json.loads(result.stdout)["experts"][0]["layers"][0]
    assert layer["bytes_read"] > 0 and {expert["tier"] for expert in layer["selected"]} <= set(TIERS)
    for view in ("--experts", "--experts-detail"):
        shown = CliRunner().invoke(app, [*arguments, view]).stdout
        assert "was on disk when the layer needed it" in shown and "experts were in memory: reading the others" in shown
