"""The router: which experts are selected for each token, and why (paper section 2.1.2, equations 12-16 and 19-20).

Shapes: T tokens (batch and time flattened), D hidden, E experts, K chosen, G groups.

Everything is float32: with biases near 5, as released, bfloat16 could not tell two experts apart. Selection ranks the
*biased* affinity; the gate weights come from the *unbiased* one. The whole decision is returned as one value: trace,
balance and losses use it, and it is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soli import kernels
from soli.analysis.notebook_views import heat_map
from soli.analysis.residency import PassResidency, Residency, join_residency
from soli.config import ModelConfig
from soli.model.layers import Device


@dataclass(frozen=True, repr=False)
class Routing:
    """One MoE layer's decision for T tokens."""

    expert_ids_TK: Tensor  # int64, best first by biased affinity
    weights_TK: Tensor  # float32 gates, normalised and scaled: what the experts' outputs are multiplied by
    scores_TE: Tensor  # float32 affinity: sigmoid or softmax of the router's logits, unbiased
    biased_TE: Tensor  # float32 affinity + bias: what selection ranks; the same tensor without bias; -inf where masked
    groups_TG: Tensor | None  # bool, groups that survived; None where selection is not limited to groups
    residency: Residency | None = None  # where the chosen experts were when they were needed; None: always in memory

    @property
    def num_experts(self) -> int:
        return self.scores_TE.shape[1]

    def counts_E(self) -> Tensor:
        """Tokens per expert, int64 (E,)."""
        return kernels.count_tokens(self.expert_ids_TK, self.num_experts)

    def __repr__(self) -> str:
        return f"<Routing: {self._description()}>"

    def _repr_html_(self) -> str:
        shares_TE = torch.zeros_like(self.scores_TE).scatter(1, self.expert_ids_TK, self.weights_TK)
        return heat_map(f"{self._description()}; a row per token", shares_TE.tolist(), "token", "weight")

    def _description(self) -> str:
        tokens, K = self.expert_ids_TK.shape
        surviving = "" if self.groups_TG is None else f", {self.groups_TG.shape[1]} groups"
        return f"{K} of {self.num_experts} experts for each of {tokens} tokens{surviving}"


class Routings(Sequence[Routing]):
    """The decisions of several layers, stacked; each is made when it is asked for.

    Layers M: `ids_MTK`, `weights_MTK`, `scores_MTE`, `biased_MTE` and `groups_MTG` as in Routing; of one group there is
    no choice of groups. `residency`: of the forward passes over consecutive tokens, empty where all experts are in
    memory for good.
    """

    def __init__(
        self,
        ids_MTK: Tensor,
        weights_MTK: Tensor,
        scores_MTE: Tensor,
        biased_MTE: Tensor,
        groups_MTG: Tensor,
        residency: Sequence[PassResidency] = (),
    ) -> None:
        self.ids_MTK, self.weights_MTK, self.residency = ids_MTK, weights_MTK, residency
        self.scores_MTE, self.biased_MTE, self.groups_MTG = scores_MTE, biased_MTE, groups_MTG

    def __len__(self) -> int:
        return len(self.ids_MTK)

    @overload
    def __getitem__(self, layer: int) -> Routing: ...
    @overload
    def __getitem__(self, layer: slice) -> tuple[Routing, ...]: ...
    def __getitem__(self, layer: int | slice) -> Routing | tuple[Routing, ...]:
        if isinstance(layer, slice):
            return tuple(self[i] for i in range(*layer.indices(len(self))))
        if not -len(self) <= layer < len(self):
            raise IndexError(f"layer {layer} of {len(self)}")
        groups_TG = self.groups_MTG[layer] if self.groups_MTG.shape[2] > 1 else None
        return Routing(
            self.ids_MTK[layer],
            self.weights_MTK[layer],
            self.scores_MTE[layer],
            self.biased_MTE[layer],
            groups_TG,
            self._layer_residency(layer),
        )

    def _layer_residency(self, layer: int) -> Residency | None:
        if not self.residency:
            return None
        passes = self.ids_MTK[layer].split([one.tokens for one in self.residency])
        return join_residency(
            [one.of_layer(layer, ids_TK) for one, ids_TK in zip(self.residency, passes, strict=True)]
        )


def slice_routing(routing: Routing, start: int, stop: int) -> Routing:
    """The decisions for tokens start..stop-1, copied so that those of the whole step can be freed."""
    groups_TG = routing.groups_TG
    return Routing(
        expert_ids_TK=routing.expert_ids_TK[start:stop].clone(),
        weights_TK=routing.weights_TK[start:stop].clone(),
        scores_TE=routing.scores_TE[start:stop].clone(),
        biased_TE=routing.biased_TE[start:stop].clone(),
        groups_TG=None if groups_TG is None else groups_TG[start:stop].clone(),
        residency=None if routing.residency is None else routing.residency.of_tokens(start, stop),
    )


def join_routing(parts: Sequence[Routing]) -> Routing:
    """One layer's decisions over consecutive tokens as one Routing."""
    groups = [part.groups_TG for part in parts if part.groups_TG is not None]
    residency = [part.residency for part in parts if part.residency is not None]
    return Routing(
        expert_ids_TK=torch.cat([part.expert_ids_TK for part in parts]),
        weights_TK=torch.cat([part.weights_TK for part in parts]),
        scores_TE=torch.cat([part.scores_TE for part in parts]),
        biased_TE=torch.cat([part.biased_TE for part in parts]),
        groups_TG=torch.cat(groups) if groups else None,
        residency=join_residency(residency) if residency else None,
    )


def count_choices(layers: Sequence[Routing]) -> Tensor:
    """Tokens per expert of each layer, int64 (layers, E)."""
    if isinstance(layers, Routings):
        ids_MTK, E = layers.ids_MTK, layers.scores_MTE.shape[2]
    else:
        ids_MTK, E = torch.stack([routing.expert_ids_TK for routing in layers]), layers[0].num_experts
    M = len(ids_MTK)
    indices_MTK = ids_MTK + E * torch.arange(M, device=ids_MTK.device)[:, None, None]
    if ids_MTK.is_cpu:  # in every step of the engine, where three torch calls would be felt
        return torch.bincount(indices_MTK.flatten(), minlength=M * E).view(M, E)
    return kernels.count_tokens(indices_MTK.flatten(0, 1), M * E).view(M, E)


class Router(nn.Module):
    """Affinity, selection and gates of one layer. The bias is a persistent float32 buffer, stepped in place."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        E = config.n_routed_experts or 0
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size, device=device, dtype=dtype))
        biased = config.topk_method == "noaux_tc"
        bias = torch.zeros(E, dtype=torch.float32, device=device) if biased else None
        self.register_buffer("e_score_correction_bias", bias)
        self.K, self.scoring_func = config.num_experts_per_tok, config.scoring_func
        self.normalise, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        limited = config.topk_method != "greedy" and config.n_group > 1
        self.G, self.kept_groups = (config.n_group, config.topk_group) if limited else (1, 1)
        # With a bias a group counts by its two best experts together, without (V2) by its best one.
        self.experts_per_group_score = 2 if biased or config.family.ranks_groups_by_pairs else 1

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Let ``model.to(bfloat16)`` move the bias but not round it."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None:
            assert self.e_score_correction_bias is not None
            moved = self.e_score_correction_bias
            if moved.dtype != torch.float32:
                self.e_score_correction_bias = bias.to(moved.device)
        return self

    def forward(self, x_TD: Tensor, masked_TE: Tensor | None = None) -> Routing:
        """Decide for T tokens of width D. Where `masked_TE` (bool) is true the biased affinity is -inf: at least K
        experts of the groups that survive must be left."""
        logits_TE = F.linear(x_TD.to(torch.float32), self.weight.to(torch.float32))
        scores_TE = logits_TE.sigmoid() if self.scoring_func == "sigmoid" else logits_TE.softmax(dim=-1)
        bias_E = self.e_score_correction_bias
        biased_TE = scores_TE if bias_E is None else scores_TE + bias_E
        if masked_TE is not None:
            biased_TE = biased_TE.masked_fill(masked_TE, float("-inf"))
        with torch.no_grad():
            ids_TK, groups_TG = self.select(biased_TE)
        weights_TK = scores_TE.gather(1, ids_TK)
        # differs: DeepSeek-V2's own code scales only when it does not normalise; every released V2 leaves
        # norm_topk_prob false, where the two agree.
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(ids_TK, weights_TK * self.scaling, scores_TE, biased_TE.detach(), groups_TG)

    def select(self, biased_TE: Tensor) -> tuple[Tensor, Tensor | None]:
        """The K best experts within the surviving groups, best first."""
        if self.G == 1:
            return biased_TE.topk(self.K, dim=-1).indices, None
        grouped_TGM = biased_TE.unflatten(1, (self.G, -1))
        rank_TG = grouped_TGM.topk(self.experts_per_group_score, dim=-1).values.sum(dim=-1)
        groups_TG = torch.zeros_like(rank_TG, dtype=torch.bool)
        groups_TG.scatter_(1, rank_TG.topk(self.kept_groups, dim=-1).indices, True)
        # -inf, not 0: a biased score can be negative, and a masked zero would beat it.
        masked_TGM = grouped_TGM.masked_fill(~groups_TG[..., None], float("-inf"))
        return masked_TGM.flatten(1).topk(self.K, dim=-1).indices, groups_TG
