"""The trace against a plain-Python reading of the router's rules, one token at a time."""

import math

import pytest
import torch

from soli.analysis.trace import trace_layer, trace_tokens
from soli.engine.generate import generate
from soli.model.router import Router
from tests.engine.tiny import tiny_model


def chosen(ranks: list[float], groups: int, kept: int, experts: int, best: int) -> tuple[list[int], set[int]]:
    """The router's rule on one token: the best groups by their `best` best experts, then the best experts within."""
    size = len(ranks) // groups
    members = {g: range(g * size, (g + 1) * size) for g in range(groups)}
    value = {g: sum(sorted((ranks[e] for e in members[g]), reverse=True)[:best]) for g in members}
    alive = set(sorted(members, key=lambda g: -value[g])[:kept])
    inside = [e for g in alive for e in members[g]]
    return sorted(inside, key=lambda e: -ranks[e])[:experts], alive


@pytest.mark.parametrize("kind", ["v3", "v3 without q_lora or groups", "v2 by groups", "v2 greedy"])
def test_who_plays_who_was_let_in_who_was_kept_out_and_who_nearly_played(kind):
    model = tiny_model(kind)
    router: Router = next(moe for _, moe in model.moe_layers()).gate
    x_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        routing = router(x_TD)
    swayed = 0
    for token, found in enumerate(trace_layer("layers.1", router, routing)):
        scores, biased = routing.scores_TE[token].tolist(), routing.biased_TE[token].tolist()
        best = 2 if kind.startswith("v3") else 1
        groups = (router.G, router.kept_groups, router.K, best)
        played, alive = chosen(biased, *groups)
        unbiased, _ = chosen(scores, *groups)
        assert [player.expert for player in found.players] == played
        assert {player.expert for player in found.players if player.let_in} == set(played) - set(unbiased)
        assert {out.expert for out in found.kept_out} == set(unbiased) - set(played)
        assert found.groups == (tuple(sorted(alive)) if router.G > 1 else None)
        size = len(scores) // router.G
        left = sorted(
            (e for g in alive for e in range(g * size, (g + 1) * size) if e not in played), key=lambda e: -biased[e]
        )
        assert [near.expert for near in found.near_misses] == left[:2]
        for near in found.near_misses:
            assert near.margin == pytest.approx(biased[played[-1]] - biased[near.expert]) and near.margin >= 0
        for player in found.players:
            assert (player.affinity, player.biased) == (scores[player.expert], biased[player.expert])
        total = sum(scores[expert] for expert in played) if router.normalise else 1.0
        assert math.isclose(found.players[0].weight, scores[played[0]] / total * router.scaling, rel_tol=1e-5)
        assert sum(share for _, share in found.by_weight()) == pytest.approx(1)
        swayed += bool(found.kept_out)
    assert (swayed > 5) == kind.startswith("v3"), "only a bias can let anyone in"


def test_without_anyone_left_there_is_no_near_miss():
    model = tiny_model(n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1)
    router = next(moe for _, moe in model.moe_layers()).gate
    with torch.no_grad():
        found = trace_layer("layers.1", router, router(torch.randn(2, 32)))
    assert all(layer.near_misses == () and layer.kept_out == () for layer in found)


def test_tokens_carry_their_part_and_the_unread_one_is_left_out():
    model = tiny_model()
    [generation] = generate(model, [[5, 6, 7]], max_new_tokens=4, trace=True)
    tokens = [5, 6, 7, *generation.ids]
    found = trace_tokens(model, generation.routing, tokens, [f"t{token}" for token in tokens], 3)
    assert [token.part for token in found] == ["prompt"] * 3 + ["answer"] * 3
    assert [token.token for token in found] == tokens[:-1]
    assert [layer.layer for layer in found[0].layers] == ["layers.1", "layers.2"]


def test_a_model_without_experts_has_an_empty_trace():
    assert trace_tokens(tiny_model("dense"), (), [5], ["a"], 1) == []
