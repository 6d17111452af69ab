"""What the routers decided, as plain values: for each token the experts selected, those that the bias promoted or
demoted, and the runners-up.

"Promoted" and "demoted" compare the real selection (by biased affinity) with the one that the same router would have
made had its bias been zero, groups included. A runner-up is the best expert not selected *within the surviving
groups*; its margin is how far its biased affinity fell short of the last expert selected. Nothing here changes or
reruns the model.

Shapes: T tokens, E experts, K selected, M runners-up, G groups.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from soli.analysis.residency import TIERS, Residency, Tier
from soli.errors import SoliError
from soli.input_files import TABLE_BYTES, read_json
from soli.sections import annotations_of, convert, shown

RUNNER_UPS = 2  # per token and layer
NAMES = ("selected", "promoted_by_bias", "demoted_by_bias", "runner_ups")  # in JSON
NAMES_IN_0_1 = ("players", "let_in", "kept_out", "near_misses")  # old name


class RoutingDecision(Protocol):
    """One layer's decision for T tokens: soli.model.router.Routing."""

    @property
    def expert_ids_TK(self) -> Tensor: ...
    @property
    def weights_TK(self) -> Tensor: ...
    @property
    def scores_TE(self) -> Tensor: ...
    @property
    def biased_TE(self) -> Tensor: ...
    @property
    def groups_TG(self) -> Tensor | None: ...
    @property
    def residency(self) -> Residency | None: ...


class ExpertSelector(Protocol):
    """The selection rule of one layer: soli.model.router.Router."""

    def select(self, biased_TE: Tensor) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class SelectedExpert:
    """An expert that computed. `weight` multiplies its output; `affinity` is unbiased; selection ranked `biased`."""

    expert: int
    weight: float
    affinity: float
    biased: float
    promoted_by_bias: bool  # would not have been selected with a bias of zero


@dataclass(frozen=True)
class PagedExpert(SelectedExpert):
    """The same where experts are read from disk. `tier`: where it was when the layer needed it: in "memory", "reading"
    (ahead, not yet in memory), or on "disk"."""

    tier: Tier


@dataclass(frozen=True)
class DemotedExpert:
    """An expert that would have been selected had the router's bias been zero."""

    expert: int
    affinity: float
    biased: float


@dataclass(frozen=True)
class RunnerUp:
    """An expert next in rank; it missed selection by `margin` in biased affinity."""

    expert: int
    affinity: float
    biased: float
    margin: float


@dataclass(frozen=True)
class LayerTrace:
    """One router's decision for one token. `groups`: the surviving groups, None where selection has no groups."""

    layer: str
    selected: tuple[SelectedExpert, ...]
    demoted_by_bias: tuple[DemotedExpert, ...]
    runner_ups: tuple[RunnerUp, ...]
    groups: tuple[int, ...] | None

    def by_weight(self) -> list[tuple[SelectedExpert, float]]:
        """The selected experts, heaviest first, each with its share of the routed weight (1 in all)."""
        total = sum(expert.weight for expert in self.selected) or 1.0
        return [(expert, expert.weight / total) for expert in sorted(self.selected, key=lambda expert: -expert.weight)]


@dataclass(frozen=True)
class PagedLayerTrace(LayerTrace):
    """The same where experts are read from disk. `waited_ms`: milliseconds that the layer waited for experts in the
    forward pass that computed the token; `bytes_read`: of the experts that were not in memory. All `pass_tokens` tokens
    of that pass share both."""

    selected: tuple[PagedExpert, ...]
    waited_ms: float
    bytes_read: int
    pass_tokens: int


@dataclass(frozen=True)
class TokenTrace:
    """One token that the model read, and the decision of every MoE layer about it. `part`: "prompt" or "answer"."""

    position: int
    token: int
    text: str
    part: str
    layers: tuple[LayerTrace | PagedLayerTrace, ...]


# The fields that are lists of other dataclasses.
ITEMS = {
    "layers": LayerTrace,
    "selected": SelectedExpert,
    "demoted_by_bias": DemotedExpert,
    "runner_ups": RunnerUp,
}


def trace_tokens(
    routers: Sequence[tuple[str, ExpertSelector]],
    routing: Sequence[RoutingDecision],
    tokens: Sequence[int],
    texts: Sequence[str],
    prompt_length: int,
    start: int = 0,
) -> list[TokenTrace]:
    """The decisions about `tokens[start:]`; `routing` holds one decision per main MoE layer for the tokens read.

    `routers` are the layers' names and routers in the order of `routing`; those of MTP modules may follow and are not
    used. `texts` are the tokens as a person should see them. Tokens beyond the routing (sampled, but never read) are
    left out.
    """
    used = routers[: len(routing)]
    layers = [trace_layer(name, router, part) for (name, router), part in zip(used, routing, strict=True)]
    return [
        TokenTrace(at, tokens[at], texts[at], "prompt" if at < prompt_length else "answer", decisions)
        for at, decisions in enumerate(zip(*layers, strict=True), start)
    ]


def trace_layer(name: str, router: ExpertSelector, routing: RoutingDecision) -> list[LayerTrace]:
    """One LayerTrace per token of `routing`, which must be a decision of `router`."""
    selected_TE = _mask(routing.expert_ids_TK, routing.scores_TE)
    # A masked expert (biased affinity -inf) would not have been selected without the bias either.
    unbiased_TK, _ = router.select(routing.scores_TE.masked_fill(routing.biased_TE == -torch.inf, -torch.inf))
    unbiased_TE = _mask(unbiased_TK, routing.scores_TE)
    promoted_TK = (selected_TE & ~unbiased_TE).gather(1, routing.expert_ids_TK)
    columns = zip(
        _selected(routing, promoted_TK),
        _demoted(routing, unbiased_TE & ~selected_TE),
        _runner_ups(routing, selected_TE),
        _groups(routing),
        strict=True,
    )
    if routing.residency is None:
        return [LayerTrace(name, *column) for column in columns]
    return [
        PagedLayerTrace(name, _with_tiers(selected, tiers), demoted, runner_ups, groups, *cost)
        for (selected, demoted, runner_ups, groups), (tiers, *cost) in zip(
            columns, _costs(routing.residency), strict=True
        )
    ]


def rank_runner_ups(routing: RoutingDecision, selected_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The next best experts (T,M) in the surviving groups and by how much each missed (T,M); +inf: there is none."""
    others_TE = routing.biased_TE.masked_fill(selected_TE, -torch.inf)
    if routing.groups_TG is not None:
        per_group = others_TE.shape[1] // routing.groups_TG.shape[1]
        others_TE = others_TE.masked_fill(~routing.groups_TG.repeat_interleave(per_group, dim=1), -torch.inf)
    best = others_TE.topk(min(RUNNER_UPS, others_TE.shape[1]), dim=-1)
    last_T1 = routing.biased_TE.masked_fill(~selected_TE, torch.inf).amin(dim=-1, keepdim=True)
    return best.indices, last_T1 - best.values


def read_trace(source: str | Path | Sequence[dict[str, Any]]) -> list[TokenTrace]:
    """A trace read back from JSON: a file of `soli translate --experts --json` or `soli generate --experts --json`, or
    its list of tokens. SoliError when it is none.

    Traces of Soli 0.1, which have other names for the same fields, are read as well.
    """
    tokens: Any = source
    where = ""
    if isinstance(source, str | Path):
        where = f"{source}: "
        tokens = read_json(source, TABLE_BYTES)
        if isinstance(tokens, dict):
            tokens = tokens.get("experts")
    try:
        return [_read(TokenTrace, token, f"token {number}") for number, token in enumerate(_listed(tokens, "experts"))]
    except SoliError as error:
        raise SoliError(f"{where}this is no trace of soli --experts --json ({error})") from None


def _read(kind: Any, table: Any, place: str) -> Any:
    """One of the dataclasses above from a JSON object, every field there and of its type. `place` is for errors."""
    if not isinstance(table, Mapping):
        raise SoliError(f"{place} is {shown(table)}, not an object")
    if kind is LayerTrace and "waited_ms" in table:
        kind = PagedLayerTrace
    if kind is SelectedExpert and "tier" in table:
        kind = PagedExpert
    is_old = issubclass(kind, LayerTrace) and "players" in table
    names = dict(zip(NAMES, NAMES_IN_0_1 if is_old else NAMES, strict=True))
    if issubclass(kind, SelectedExpert) and "let_in" in table:  # old name
        names["promoted_by_bias"] = "let_in"  # old name
    stored_names = {name: names.get(name, name) for name in annotations_of(kind)}
    missing = [name for name in stored_names.values() if name not in table]
    if missing:
        raise SoliError(f"{place} has no {', '.join(missing)}")
    values: dict[str, Any] = {}
    for name, annotation in annotations_of(kind).items():
        value, part = table[stored_names[name]], f"{place}, {stored_names[name]}"
        if name in ITEMS:
            values[name] = tuple(_read(ITEMS[name], item, f"{part} {i}") for i, item in enumerate(_listed(value, part)))
        else:
            values[name] = convert(part, value, annotation)
    return kind(**values)


def _listed(value: Any, place: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise SoliError(f"{place} is {shown(value)}, not a list")
    return value


def _mask(experts_TK: Tensor, scores_TE: Tensor) -> Tensor:
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, experts_TK, True)


def _rows(*columns: Tensor) -> Iterable[tuple[Any, ...]]:
    """Per token, the values that each of the columns (T,N) has for it."""
    return zip(*(column.tolist() for column in columns), strict=True)


def _selected(routing: RoutingDecision, promoted_TK: Tensor) -> list[tuple[SelectedExpert, ...]]:
    ids_TK = routing.expert_ids_TK
    affinity_TK = routing.scores_TE.gather(1, ids_TK)
    biased_TK = routing.biased_TE.gather(1, ids_TK)
    rows = _rows(ids_TK, routing.weights_TK, affinity_TK, biased_TK, promoted_TK)
    return [tuple(SelectedExpert(*expert) for expert in zip(*row, strict=True)) for row in rows]


def _with_tiers(selected: Sequence[SelectedExpert], tiers: Sequence[int]) -> tuple[PagedExpert, ...]:
    pairs = zip(selected, tiers, strict=True)
    return tuple(PagedExpert(**vars(expert), tier=TIERS[tier]) for expert, tier in pairs)


def _costs(residency: Residency) -> Iterable[tuple[Any, ...]]:
    """Per token, its experts' tiers and what the layer cost."""
    rounded_T = [round(milliseconds, 3) for milliseconds in residency.waited_T.tolist()]
    others = (residency.bytes_T, residency.pass_tokens_T)
    return zip(residency.tiers_TK.tolist(), rounded_T, *(tensor.tolist() for tensor in others), strict=True)


def _demoted(routing: RoutingDecision, demoted_TE: Tensor) -> list[tuple[DemotedExpert, ...]]:
    experts: list[list[DemotedExpert]] = [[] for _ in range(demoted_TE.shape[0])]
    for token, expert in demoted_TE.nonzero().tolist():
        affinity = float(routing.scores_TE[token, expert])
        experts[token].append(DemotedExpert(expert, affinity, float(routing.biased_TE[token, expert])))
    return [tuple(sorted(row, key=lambda expert: -expert.affinity)) for row in experts]


def _runner_ups(routing: RoutingDecision, selected_TE: Tensor) -> list[tuple[RunnerUp, ...]]:
    ids_TM, margins_TM = rank_runner_ups(routing, selected_TE)
    rows = _rows(ids_TM, routing.scores_TE.gather(1, ids_TM), routing.biased_TE.gather(1, ids_TM), margins_TM)
    return [tuple(RunnerUp(*expert) for expert in zip(*row, strict=True) if expert[-1] != torch.inf) for row in rows]


def _groups(routing: RoutingDecision) -> list[tuple[int, ...] | None]:
    if routing.groups_TG is None:
        return [None] * routing.expert_ids_TK.shape[0]
    return [tuple(group for group, survives in enumerate(row) if survives) for row in routing.groups_TG.tolist()]
