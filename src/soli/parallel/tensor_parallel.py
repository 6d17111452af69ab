"""Forward passes of a model of which each rank holds a part (model_part.py): partial results, summed over the ranks.

    attention          own heads, then o_proj's partial outputs are summed
    mixture            own experts, of all tokens, and the own part of the shared experts; summed once
    dense MLP          its own width; summed
    embedding          rows of own tokens, zeros for others; summed, which is exact
    head               logits of own tokens; the first rank gets all

So each block has two sums. Tokens and hidden states, router decisions and latents are on every rank, with the same
bits: on CPUs every sum is taken in the order of ranks, in float32, and rounded once.

Shapes: T tokens, D hidden, K selected, R pairs of a token and an own expert, V vocabulary, N tokens with logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from soli.model.layers import MLP, Linear
from soli.model.moe import MoE, RoutedExperts
from soli.model.router import Routing
from soli.model.transformer import Block, Transformer
from soli.parallel.model_part import ModelPart


@dataclass(frozen=True)
class Sums:
    """Sums over all ranks, to the same bits on each. `scattered_from`: elements from which the ranks divide a sum."""

    world: int
    scattered_from: int = 2**16

    def total(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' `partial`, in its dtype."""
        if partial.is_cuda:
            dist.all_reduce(partial)
            return partial
        if self.world == 2 or partial.numel() < self.scattered_from:
            return _ordered_sum(self.gather(partial))
        # Each rank sums a share of the elements: 2 (N - 1) / N of the bytes instead of N - 1, in two collectives.
        values = F.pad(partial.flatten(), (0, -partial.numel() % self.world))
        received = torch.empty_like(values)
        dist.all_to_all_single(received, values)
        shares = self.gather(_ordered_sum(received.chunk(self.world)))
        return torch.cat(shares)[: partial.numel()].view_as(partial)

    def gather(self, part: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.world)]
        dist.all_gather(parts, part)
        return parts


def _ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """In the order of ranks, in float32, rounded once."""
    first, *others = parts
    total = first.to(torch.float32, copy=True)
    for other in others:
        total += other
    return total.to(first.dtype)


def share_layers(model: Transformer, part: ModelPart) -> None:
    """Let a model that has the weights of `part` alone compute together with the other ranks."""
    sums = Sums(part.world)
    blocks = [*model.layers, *(module.get_submodule("block") for module in model.mtp)]
    for block in blocks:
        assert isinstance(block, Block)
        _share_projection(block.self_attn.o_proj, sums)
        if isinstance(block.mlp, MoE):
            _share_experts(block.mlp.experts, part)
            _share_mixture(block.mlp, sums)
        else:
            _share_mlp(block.mlp, sums)
    _share_embedding(model, part, sums)
    _share_head(model, part, sums)


def _share_projection(o_proj: Linear, sums: Sums) -> None:
    def forward(x: Tensor) -> Tensor:
        return sums.total(Linear.forward(o_proj, x))

    o_proj.forward = forward  # type: ignore[method-assign]


def _share_mlp(mlp: MLP, sums: Sums) -> None:
    def forward(x: Tensor) -> Tensor:
        return sums.total(MLP.forward(mlp, x))

    mlp.forward = forward  # type: ignore[method-assign]


def _share_mixture(mixture: MoE, sums: Sums) -> None:
    def forward(x_BTD: Tensor, masked_TE: Tensor | None = None) -> tuple[Tensor, Routing]:
        y_BTD, routing = MoE.forward(mixture, x_BTD, masked_TE)
        return sums.total(y_BTD), routing

    mixture.forward = forward  # type: ignore[method-assign]


def _share_experts(experts: RoutedExperts, part: ModelPart) -> None:
    own = part.experts()

    def forward(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        token_R, choice_R = ((expert_ids_TK >= own.start) & (expert_ids_TK < own.stop)).nonzero(as_tuple=True)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        if len(token_R):
            ids_R1 = expert_ids_TK[token_R, choice_R][:, None] - own.start
            weights_R1 = weights_TK[token_R, choice_R][:, None]
            y_RD = RoutedExperts.forward(experts, x_TD.index_select(0, token_R), ids_R1, weights_R1)
            y_TD.index_add_(0, token_R, y_RD.float())
        return y_TD.to(x_TD.dtype)

    experts.forward = forward  # type: ignore[method-assign]


def _share_embedding(model: Transformer, part: ModelPart, sums: Sums) -> None:
    embedding, own = model.embed_tokens, part.rows(part.config.vocab_size)

    def forward(input: Tensor) -> Tensor:
        ids = input
        is_own = (ids >= own.start) & (ids < own.stop)
        rows = F.embedding((ids - own.start).clamp(0, len(own) - 1), embedding.weight)
        return sums.total(rows.masked_fill(~is_own[..., None], 0.0))

    embedding.forward = forward  # type: ignore[method-assign]


def _share_head(model: Transformer, part: ModelPart, sums: Sums) -> None:
    head, vocab_size = model.lm_head, part.config.vocab_size
    widths = [len(part.rows(vocab_size, rank)) for rank in range(part.world)]

    def forward(x: Tensor) -> Tensor:
        own_NV = Linear.forward(head, x)
        parts = sums.gather(F.pad(own_NV, (0, max(widths) - own_NV.shape[-1])))
        return torch.cat([part_NV[..., :width] for part_NV, width in zip(parts, widths, strict=True)], dim=-1)

    head.forward = forward  # type: ignore[method-assign]
