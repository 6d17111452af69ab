"""What the routers decided, as plain values: who played for a token, who was let in or kept out by the bias, who
nearly played.

"Let in" and "kept out" compare the real choice (by biased affinity) with the one the same router would have made had
its bias been zero, groups included. A near miss is the best expert left over *within the surviving groups*; its
margin is how far its biased affinity fell short of the last expert chosen. Pure reading: nothing here changes or
reruns the model.

Shapes: T tokens, E experts, K chosen, M near misses kept, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soli.model.router import Router, Routing
from soli.model.transformer import Transformer

NEAR_MISSES = 2


@dataclass(frozen=True)
class Player:
    """An expert that played. `weight` multiplies its output; `affinity` is unbiased; selection ranked `biased`."""

    expert: int
    weight: float
    affinity: float
    biased: float
    let_in: bool


@dataclass(frozen=True)
class KeptOut:
    """An expert that would have played had the router's bias been zero."""

    expert: int
    affinity: float
    biased: float


@dataclass(frozen=True)
class NearMiss:
    """An expert next in line; it missed by `margin` in biased affinity."""

    expert: int
    affinity: float
    biased: float
    margin: float


@dataclass(frozen=True)
class LayerTrace:
    """One router's decision for one token. `groups`: the surviving groups, None where selection has no groups."""

    layer: str
    players: tuple[Player, ...]
    kept_out: tuple[KeptOut, ...]
    near_misses: tuple[NearMiss, ...]
    groups: tuple[int, ...] | None

    def by_weight(self) -> list[tuple[Player, float]]:
        """The players, heaviest first, each with its share of the routed weight (1 in all)."""
        total = sum(player.weight for player in self.players) or 1.0
        heaviest_first = sorted(self.players, key=lambda player: -player.weight)
        return [(player, player.weight / total) for player in heaviest_first]


@dataclass(frozen=True)
class TokenTrace:
    """One token that the model read, and the decision of every MoE layer about it. `part`: "prompt" or "answer"."""

    position: int
    token: int
    text: str
    part: str
    layers: tuple[LayerTrace, ...]


def trace_tokens(
    model: Transformer, routing: Sequence[Routing], tokens: Sequence[int], texts: Sequence[str], prompt_length: int
) -> list[TokenTrace]:
    """The decisions about `tokens`, the first of all that a model read; `routing` holds one Routing per main MoE layer.

    `texts` are the tokens as a person should see them. Tokens beyond the routing (drawn, but never read) are left out.
    """
    named = list(model.moe_layers())[: len(routing)]  # the routers of the MTP modules come after and did not play
    layers = [trace_layer(name, moe.gate, part) for (name, moe), part in zip(named, routing, strict=True)]
    return [
        TokenTrace(at, tokens[at], texts[at], "prompt" if at < prompt_length else "answer", decisions)
        for at, decisions in enumerate(zip(*layers, strict=True))
    ]


def trace_layer(name: str, router: Router, routing: Routing) -> list[LayerTrace]:
    """One LayerTrace per token of `routing`, which must be a decision of `router`."""
    chosen_TE = _mask(routing.expert_ids_TK, routing.num_experts)
    # A muted expert (biased affinity -inf) would not have played without the bias either.
    unbiased_TK, _ = router.select(routing.scores_TE.masked_fill(routing.biased_TE == -torch.inf, -torch.inf))
    wanted_TE = _mask(unbiased_TK, routing.num_experts)
    near_TM, margins_TM = near_misses(routing, chosen_TE)
    columns = zip(
        _players(routing, (chosen_TE & ~wanted_TE).gather(1, routing.expert_ids_TK)),
        _kept_out(routing, wanted_TE & ~chosen_TE),
        _near(routing, near_TM, margins_TM),
        _groups(routing),
        strict=True,
    )
    return [LayerTrace(name, *column) for column in columns]


def near_misses(routing: Routing, chosen_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The next best experts (T,M) in the surviving groups and by how much each missed (T,M); +inf: there is none."""
    left_TE = routing.biased_TE.masked_fill(chosen_TE, -torch.inf)
    if routing.groups_TG is not None:
        per_group = routing.num_experts // routing.groups_TG.shape[1]
        left_TE = left_TE.masked_fill(~routing.groups_TG.repeat_interleave(per_group, dim=1), -torch.inf)
    best = left_TE.topk(min(NEAR_MISSES, routing.num_experts), dim=-1)
    last_T1 = routing.biased_TE.masked_fill(~chosen_TE, torch.inf).amin(dim=-1, keepdim=True)
    return best.indices, last_T1 - best.values


def _mask(experts_TK: Tensor, num_experts: int) -> Tensor:
    shape = (experts_TK.shape[0], num_experts)
    return torch.zeros(shape, dtype=torch.bool, device=experts_TK.device).scatter_(1, experts_TK, True)


def _players(routing: Routing, let_in_TK: Tensor) -> list[tuple[Player, ...]]:
    ids_TK = routing.expert_ids_TK
    columns = (
        ids_TK,
        routing.weights_TK,
        routing.scores_TE.gather(1, ids_TK),
        routing.biased_TE.gather(1, ids_TK),
        let_in_TK,
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [tuple(Player(*player) for player in zip(*row, strict=True)) for row in rows]


def _kept_out(routing: Routing, kept_out_TE: Tensor) -> list[tuple[KeptOut, ...]]:
    found: list[list[KeptOut]] = [[] for _ in range(kept_out_TE.shape[0])]
    scores_TE, biased_TE = routing.scores_TE, routing.biased_TE
    for token, expert in kept_out_TE.nonzero().tolist():
        found[token].append(KeptOut(expert, float(scores_TE[token, expert]), float(biased_TE[token, expert])))
    return [tuple(sorted(row, key=lambda out: -out.affinity)) for row in found]


def _near(routing: Routing, near_TM: Tensor, margins_TM: Tensor) -> list[tuple[NearMiss, ...]]:
    columns = (near_TM, routing.scores_TE.gather(1, near_TM), routing.biased_TE.gather(1, near_TM), margins_TM)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [tuple(NearMiss(*near) for near in zip(*row, strict=True) if near[-1] != float("inf")) for row in rows]


def _groups(routing: Routing) -> list[tuple[int, ...] | None]:
    if routing.groups_TG is None:
        return [None] * routing.expert_ids_TK.shape[0]
    return [tuple(group for group, alive in enumerate(row) if alive) for row in routing.groups_TG.tolist()]
