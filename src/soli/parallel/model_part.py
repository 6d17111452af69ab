"""The part of a model that one of N ranks holds in inference, and the sizes that N must divide.

    attention          H / N heads: rows of q_proj, q_b_proj and kv_b_proj, columns of o_proj; the latents' projections,
                       norms and the indexer on every rank, because the latents are those of all heads
    MLPs               rows of gate and up, columns of down, of dense layers and shared experts
    routed experts     E / N of each layer, whole; the router on every rank
    embedding, head    rows: tokens of the vocabulary

Widths and vocabularies are cut where no quantized weight has a block, so that the parts may differ by one block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from soli.checkpoint.name_map import Slot
from soli.checkpoint.part import Cut, SlotPart
from soli.config import ModelConfig
from soli.errors import SoliError
from soli.model.attention import LatentAttention
from soli.model.layers import MLP, Linear
from soli.model.moe import RoutedExperts
from soli.model.transformer import Transformer

BLOCKS: Final = (128, 64, 32)  # columns or rows that may share a scale
HEAD_ROWS: Final = ("self_attn.q_proj.weight", "self_attn.q_b_proj.weight", "self_attn.kv_b_proj.weight")
MAX_RANKS: Final = 1024


@dataclass(frozen=True)
class ModelPart:
    """That of rank `rank` of `world`. `in_blocks`: weights may stay quantized."""

    config: ModelConfig
    rank: int
    world: int
    in_blocks: bool = False

    def __post_init__(self) -> None:
        """SoliError, with the numbers of ranks that would do, where heads or experts cannot be shared."""
        problems = [
            f"{name} is {size}"
            for name, size in (
                ("num_attention_heads", self.config.num_attention_heads),
                ("n_routed_experts", self.config.n_routed_experts or 0),
            )
            if size % self.world
        ]
        widths = {
            "vocab_size": self.config.vocab_size,
            "intermediate_size": self.config.intermediate_size,
            "the shared experts' width": (self.config.moe_intermediate_size or 0) * (self.config.n_shared_experts or 0),
        }
        for name, width in widths.items():
            if 0 < width < self.world:
                raise SoliError(f"{self.world} processes cannot share this model: {name} is {width}; use fewer")
        if problems:
            numbers = " or ".join(map(str, possible_worlds(self.config))) or "1"
            raise SoliError(
                f"{self.world} processes cannot share this model: {' and '.join(problems)}, which their number must "
                f"divide; use {numbers}"
            )

    def slot_part(self, slot: Slot) -> SlotPart | None:
        """What this rank has of a tensor of the files; None where that is nothing."""
        if slot.expert is not None:
            own = self.experts()
            if slot.expert not in own:
                return None
            return SlotPart(replace(slot, expert=slot.expert - own.start), slot)
        cut = self._cut(slot)
        if cut is None:
            # The bias is added once, to the sum over the ranks.
            return SlotPart(slot, slot) if self.rank == 0 or not slot.soli.endswith("o_proj.bias") else None
        shape = list(slot.shape)
        shape[cut.dimension] = cut.stop - cut.start
        return SlotPart(replace(slot, shape=tuple(shape)), slot, cut)

    def experts(self) -> range:
        """The routed experts of this rank, by their number in a layer."""
        return self._even(self.config.n_routed_experts or 0)

    def rows(self, size: int, rank: int | None = None) -> range:
        """The part of a width or of a vocabulary, of this rank or another."""
        rank = self.rank if rank is None else rank
        units = (unit for unit in BLOCKS if self.in_blocks and size % unit == 0 and size // unit >= self.world)
        unit = next(units, 1)
        blocks = size // unit
        return range(unit * (rank * blocks // self.world), unit * ((rank + 1) * blocks // self.world))

    def reshape(self, model: Transformer) -> None:
        """Give a model without weights the shapes of this part."""
        for name, module in model.named_modules():
            if isinstance(module, LatentAttention):
                self._reshape_attention(module)
            elif isinstance(module, MLP):
                own = len(self.rows(module.down_proj.in_features))
                _resize(module.gate_proj, rows=own)
                _resize(module.up_proj, rows=own)
                _resize(module.down_proj, columns=own)
            elif isinstance(module, RoutedExperts):
                for name in ("gate_up_proj", "down_proj"):
                    whole = module.get_parameter(name)
                    setattr(module, name, _empty(whole, (len(self.experts()), *whole.shape[1:])))
        own = len(self.rows(self.config.vocab_size))
        embedding = model.embed_tokens
        embedding.num_embeddings = own
        embedding.weight = _empty(embedding.weight, (own, embedding.embedding_dim))
        _resize(model.lm_head, rows=own)
        if self.config.tie_word_embeddings:
            model.lm_head.weight = embedding.weight

    def _reshape_attention(self, attention: LatentAttention) -> None:
        queries = attention.q_b_proj if attention.q_lora else attention.q_proj
        for linear in (queries, attention.kv_b_proj):
            _resize(linear, rows=linear.out_features // self.world)
        _resize(attention.o_proj, columns=attention.o_proj.in_features // self.world)
        attention.H //= self.world
        if self.rank > 0:
            attention.o_proj.register_parameter("bias", None)

    def _cut(self, slot: Slot) -> Cut | None:
        name = slot.soli
        if name.endswith(HEAD_ROWS):
            return _as_cut(0, self._even(slot.shape[0]))
        if name.endswith("self_attn.o_proj.weight"):
            return _as_cut(1, self._even(slot.shape[1]))
        if name in ("embed_tokens.weight", "lm_head.weight"):
            return _as_cut(0, self.rows(slot.shape[0]))
        if name.endswith((".gate_proj.weight", ".up_proj.weight")):
            return _as_cut(0, self.rows(slot.shape[0]))
        if name.endswith(".down_proj.weight"):
            return _as_cut(1, self.rows(slot.shape[1]))
        return None

    def _even(self, size: int) -> range:
        own = size // self.world
        return range(self.rank * own, (self.rank + 1) * own)


def possible_worlds(config: ModelConfig) -> Iterator[int]:
    """The numbers of ranks, above 1, that can share heads and experts."""
    heads, experts = config.num_attention_heads, config.n_routed_experts or 0
    return (world for world in range(2, MAX_RANKS + 1) if heads % world == 0 and experts % world == 0)


def _as_cut(dimension: int, part: range) -> Cut:
    return Cut(dimension, part.start, part.stop)


def _resize(linear: Linear, rows: int | None = None, columns: int | None = None) -> None:
    linear.out_features = linear.out_features if rows is None else rows
    linear.in_features = linear.in_features if columns is None else columns
    linear.weight = _empty(linear.weight, (linear.out_features, linear.in_features))


def _empty(like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
