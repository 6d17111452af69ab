"""The trace against the router's rules in plain Python, one token at a time; traces read back, old ones included."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from soli.analysis.trace import read_trace, trace_layer, trace_tokens
from soli.errors import SoliError
from soli.model.router import Router
from tests.engine.oracle import continuation
from tests.engine.tiny import tiny_model


def select(ranks: list[float], groups: int, kept_groups: int, experts: int, best: int) -> tuple[list[int], set[int]]:
    """The router's rule on one token: the best groups by their `best` best experts, then the best experts within."""
    size = len(ranks) // groups
    members = {g: range(g * size, (g + 1) * size) for g in range(groups)}
    value = {g: sum(sorted((ranks[e] for e in members[g]), reverse=True)[:best]) for g in members}
    surviving = set(sorted(members, key=lambda g: -value[g])[:kept_groups])
    candidates = [e for g in surviving for e in members[g]]
    return sorted(candidates, key=lambda e: -ranks[e])[:experts], surviving


def routers(model) -> list[tuple[str, Router]]:
    return [(name, moe.gate) for name, moe in model.moe_layers()]


@pytest.mark.parametrize("kind", ["v3", "v3 without q_lora or groups", "v2 by groups", "v2 greedy"])
def test_selected_promoted_and_demoted_experts_and_runners_up(kind):
    model = tiny_model(kind)
    router: Router = next(moe for _, moe in model.moe_layers()).gate
    x_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        routing = router(x_TD)
    changed = 0
    for token, layer in enumerate(trace_layer("layers.1", router, routing)):
        scores, biased = routing.scores_TE[token].tolist(), routing.biased_TE[token].tolist()
        best = 2 if kind.startswith("v3") else 1
        rule = (router.G, router.kept_groups, router.K, best)
        selected, groups = select(biased, *rule)
        unbiased, _ = select(scores, *rule)
        assert [expert.expert for expert in layer.selected] == selected
        promoted = {expert.expert for expert in layer.selected if expert.promoted_by_bias}
        assert promoted == set(selected) - set(unbiased)
        assert {expert.expert for expert in layer.demoted_by_bias} == set(unbiased) - set(selected)
        assert layer.groups == (tuple(sorted(groups)) if router.G > 1 else None)
        size = len(scores) // router.G
        others = [e for g in groups for e in range(g * size, (g + 1) * size) if e not in selected]
        others.sort(key=lambda e: -biased[e])
        assert [expert.expert for expert in layer.runner_ups] == others[:2]
        for expert in layer.runner_ups:
            assert expert.margin == pytest.approx(biased[selected[-1]] - biased[expert.expert]) and expert.margin >= 0
        for expert in layer.selected:
            assert (expert.affinity, expert.biased) == (scores[expert.expert], biased[expert.expert])
        total = sum(scores[expert] for expert in selected) if router.normalise else 1.0
        assert math.isclose(layer.selected[0].weight, scores[selected[0]] / total * router.scaling, rel_tol=1e-5)
        assert sum(share for _, share in layer.by_weight()) == pytest.approx(1)
        changed += bool(layer.demoted_by_bias)
    assert (changed > 5) == kind.startswith("v3"), "only a bias can promote an expert"


def test_where_every_expert_is_selected_there_is_no_runner_up():
    model = tiny_model(n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1)
    router = next(moe for _, moe in model.moe_layers()).gate
    with torch.no_grad():
        layers = trace_layer("layers.1", router, router(torch.randn(2, 32)))
    assert all(layer.runner_ups == () and layer.demoted_by_bias == () for layer in layers)


def test_tokens_carry_their_part_and_the_last_sampled_one_has_no_trace():
    model = tiny_model()
    answer = continuation(model, [5, 6, 7], 4)
    tokens = [5, 6, 7, *answer.ids]
    trace = trace_tokens(routers(model), answer.routing, tokens, [f"t{token}" for token in tokens], 3)
    assert [token.part for token in trace] == ["prompt"] * 3 + ["answer"] * 3
    assert [token.token for token in trace] == tokens[:-1]
    assert [layer.layer for layer in trace[0].layers] == ["layers.1", "layers.2"]
    assert read_trace(json.loads(json.dumps([dataclasses.asdict(token) for token in trace]))) == trace


def test_a_model_without_experts_has_an_empty_trace():
    assert trace_tokens(routers(tiny_model("dense")), (), [5], ["a"], 1) == []


def test_a_trace_of_version_0_1_reads_as_the_trace_of_the_same_text_today():
    """Both by the model that version 0.1 bundled; the second was written since names in traces changed."""
    folder = Path(__file__).parent.parent / "fixtures/v0_1"
    before = read_trace(folder / "trace.json")
    today = read_trace(folder / "trace_written_today.json")
    assert [_exact(token) for token in before] == [_exact(token) for token in today]
    for old, new in zip(before, today, strict=True):
        assert _numbers(old) == pytest.approx(_numbers(new), abs=1e-5)


def test_what_is_no_trace_is_rejected_with_the_file_or_the_field(tmp_path):
    with pytest.raises(SoliError, match=r"missing\.json: cannot be read"):
        read_trace(tmp_path / "missing.json")
    with pytest.raises(SoliError, match=r"no trace .*layers"):
        read_trace([{"position": 0}])
    (tmp_path / "other.json").write_text('{"text": "no experts"}', encoding="utf-8")
    with pytest.raises(SoliError, match="no trace"):
        read_trace(tmp_path / "other.json")


def _exact(token) -> dict:
    """What does not depend on rounding."""
    layers = [
        (
            layer.layer,
            [(e.expert, e.promoted_by_bias) for e in layer.selected],
            [e.expert for e in layer.demoted_by_bias],
            [e.expert for e in layer.runner_ups],
            layer.groups,
        )
        for layer in token.layers
    ]
    return {**vars(token), "layers": layers}


def _numbers(token) -> list[float]:
    experts = [e for layer in token.layers for e in (*layer.selected, *layer.demoted_by_bias, *layer.runner_ups)]
    return [value for expert in experts for value in vars(expert).values() if isinstance(value, float)]
