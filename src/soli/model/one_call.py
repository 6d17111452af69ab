"""All layers of a pass in one C++ call, with embedding and head where logits are wanted: for inference on a CPU with a
cache that lies on pages.

This is the one place that decides it. `plan` answers None where blocks must run one after another in torch: without
such a cache, for a gradient, on other devices, under SOLI_KERNELS=reference or torch, and for modules whose parts are
not the plain ones (another backend, a sharded or tracing tensor, experts of several formats).

The tables of addresses are made once and checked whenever a text begins or many of its tokens are read at once: a
parameter that has moved, been quantized or been replaced makes a new table. A cache belongs to the weights that filled
it, so tokens that follow one by one look at nothing again.

Shapes: B batch, T tokens (of the whole batch where B is missing), N of them with logits, D hidden, W words of the
vocabulary, P pages of S slots, X = C latent + R rotary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from soli.kernels import Dispatch, cpu
from soli.kernels.cpu import fused as c
from soli.kernels.cpu import structs
from soli.kernels.cpu.backend import LOW_PRECISION, CpuBackend
from soli.model.attention import Cache, LatentAttention
from soli.model.layers import MLP, Linear, RMSNorm
from soli.model.moe import MoE, RoutedExperts
from soli.model.rope import Rope
from soli.model.router import Router, Routings

if TYPE_CHECKING:
    from soli.model.transformer import Block

SCRATCH: Final = 128 << 20  # bytes that a call's rows may take between products; more of them go in several calls
LEAST_ROWS: Final = 64  # of a call, however much that is


@dataclass(frozen=True)
class Plan:
    """One pass that C++ can take."""

    built: _Builder
    cache: Cache
    positions_BT: Tensor
    masked_experts: tuple[Tensor | None, ...]
    like: Tensor  # of the rows' dtype

    def run(self, x_BTD: Tensor) -> tuple[Tensor, Routings]:
        """The blocks and the norm after them: hidden states (B, T, D) and every router's decision, in layer order."""
        pages, table, rows = self._pages(), self.built.table, self.built.rows
        x_TD, position_T = x_BTD.flatten(0, 1), self.positions_BT.flatten()
        found = []
        for start in range(0, len(x_TD), rows):  # later rows find the latents of earlier ones in the cache
            part = slice(start, min(start + rows, len(x_TD)))
            masks = [None if m is None else m[part] for m in self.masked_experts]
            found.append(c.forward_hidden(table, x_TD[part], self._standing(position_T[part], part), pages, masks))
        y_TD = torch.cat([y for y, _ in found]) if len(found) > 1 else found[0][0]
        made = [_fields(decisions) for _, decisions in found]
        parts = [torch.cat(part, 1) for part in zip(*made, strict=True)] if len(made) > 1 else made[0]
        return y_TD.view_as(x_BTD), Routings(*parts)

    def read(self, ids_T: Tensor, ends: Sequence[int]) -> tuple[Tensor, Tensor, Routings] | None:
        """From token ids to logits (N, W) of the rows `ends`, float32; hidden states (T, D), decisions. None where the
        embedding or the head is not for C++, or there are more rows than one call takes."""
        built, words = self.built, self.built.words
        if words is None or len(ids_T) > built.rows or not built.cpu.is_faster(built.dtype, len(ends), words.quantized):
            return None
        chunks = [(chunk.start, chunk.stop, chunk.first, chunk.slots_S) for chunk in self.cache.chunks]
        rows = c.AttentionMetadata(self.positions_BT.flatten(), self.cache.table_BM, self.cache.lengths_B, chunks)
        masks = self.masked_experts
        logits_NW, y_TD, decisions = c.forward_ids(built.table, words, ids_T, ends, rows, self._pages(), masks)
        return logits_NW, y_TD, Routings(*_fields(decisions))

    def _pages(self) -> list[Tensor]:
        return [self.cache.pages(index, self.built.width, self.like) for index in self.built.indices]

    def _standing(self, position_T: Tensor, part: slice) -> c.AttentionMetadata:
        """Where some of the rows stand; a chunk that is cut is two."""
        decoding = slice(part.start, max(part.start, min(part.stop, self.cache.num_decode_tokens)))
        chunks = []
        for chunk in self.cache.chunks:
            start, stop = max(chunk.start, part.start), min(chunk.stop, part.stop)
            if start < stop:
                first = chunk.first + start - chunk.start
                chunks.append((start - part.start, stop - part.start, first, chunk.slots_S))
        table_BM, lengths_B = self.cache.table_BM[decoding].contiguous(), self.cache.lengths_B[decoding]
        return c.AttentionMetadata(position_T, table_BM, lengths_B, chunks)


def plan(
    blocks: Iterable[Any],
    norm: nn.Module,
    rope: Rope,
    like: Tensor,
    positions_BT: Tensor,
    cache: Cache | None,
    masked_experts: Mapping[int, Tensor] | None = None,
    ends: tuple[nn.Module, nn.Module] | None = None,
) -> Plan | None:
    """How C++ would run `blocks` and `norm` on a row for each position, in the dtype and on the device of `like`; None
    when it cannot. `masked_experts`: for layers by number, bool (B*T, E), which experts must not be selected for which
    tokens. `ends`: the model's embedding and head, for `Plan.read`."""
    backend = next(iter(blocks)).self_attn.backend
    if cache is None or positions_BT.numel() == 0 or not isinstance(backend, Dispatch):
        return None
    cpu_backend = backend.fused(like)
    if cpu_backend is None:
        return None
    built = _built.get(norm)
    if built is None or not built.fits(cpu_backend, rope, like.dtype) or (cache.begins and not built.holds()):
        try:
            built = _built[norm] = _Builder(list(blocks), norm, rope, like.dtype, ends, backend, cpu_backend)
        except _Unfit:
            return None
    masks = masked_experts or {}
    by_layer = tuple(masks[index].contiguous() if index in masks else None for index in built.indices) if masks else ()
    return Plan(built, cache, positions_BT, by_layer, like)


class _Unfit(Exception):
    """These modules are not for C++."""


class _Builder:
    """Makes the table of some blocks, and remembers where it looked."""

    def __init__(
        self,
        blocks: Sequence[Block],
        norm: nn.Module,
        rope: Rope,
        dtype: torch.dtype,
        ends: tuple[nn.Module, nn.Module] | None,
        backend: Dispatch,
        cpu_backend: CpuBackend,
    ) -> None:
        self.backend = backend
        self.cpu = cpu_backend
        self.dtype, self.rope = dtype, rope
        self.narrow = (dtype, torch.bfloat16)  # a float32 master under bfloat16 is torch's: it rounds before a product
        self.places: list[tuple[dict[str, Any], str]] = []  # where tensors hang
        self.packs: list[tuple[dict[str, Any], object]] = []  # attributes of modules, and what was quantized
        self.alive: list[object] = []
        self.scales = [(block.self_attn, block.self_attn.scale) for block in blocks]
        table = (structs.CLayer * len(blocks))(*(self._layer(block) for block in blocks))
        self.words = self._words(*ends) if ends else None
        self.table = c.LayerTable(self.cpu.isa, table, self._norm(norm), rope.inv_P, rope.scale, tuple(self.alive))
        # How many rows a call takes; the width of a slot; which layers of the cache these are.
        self.rows = max(LEAST_ROWS, min(c.MAX_TOKENS, SCRATCH // max(_row_bytes(layer) for layer in table)))
        self.width = blocks[0].self_attn.C + blocks[0].self_attn.R
        self.indices = tuple(block.self_attn.layer for block in blocks)
        self.addresses = [hung[name].data_ptr() for hung, name in self.places]

    def fits(self, cpu_backend: CpuBackend, rope: Rope, dtype: torch.dtype) -> bool:
        """Whether the table is of this backend, these positions and rows of this dtype."""
        return self.cpu is cpu_backend and self.rope is rope and self.dtype == dtype

    def holds(self) -> bool:
        """Whether everything is still where the table says."""
        try:
            addresses = [hung[name].data_ptr() for hung, name in self.places]
        except (KeyError, AttributeError):  # taken out, or None
            return False
        return (
            addresses == self.addresses
            and all(
                hung.get("quantized") is quantized and hung["backend"] is self.backend for hung, quantized in self.packs
            )
            and all(module.scale == scale for module, scale in self.scales)
        )

    def _words(self, embedding: nn.Module, head: nn.Module) -> c.EmbeddingAndHead | None:
        """The model's ends; None where they are not the plain ones."""
        if type(embedding) is not nn.Embedding or type(head) is not Linear or head.bias is not None:
            return None
        shape = head.out_features, head.in_features
        if embedding.weight.shape != shape:
            return None
        try:
            rows = c.vector(self._tensor(embedding._parameters, "weight", self.dtype))
            return c.EmbeddingAndHead(rows, self._weight(head), head.quantized is not None, shape)
        except _Unfit:
            return None

    def _layer(self, block: Block) -> structs.CLayer:
        attention, norm = block.self_attn, self._norm(block.input_layernorm)
        after = self._norm(block.post_attention_layernorm)
        return structs.CLayer(self._attention(attention, norm), self._feed_forward(block.mlp, after))

    def _attention(self, a: LatentAttention, norm: structs.CNorm) -> structs.CAttention:
        self._plain(a, LatentAttention)
        q_norm, q_a, q_a_bias = structs.CNorm(), structs.CWeight(), structs.CVector()
        if a.q_lora:
            q_norm, q_a, q_a_bias = self._norm(a.q_a_layernorm), self._weight(a.q_a_proj), self._bias(a.q_a_proj)
        return structs.CAttention(
            norm, q_norm, self._norm(a.kv_a_layernorm),
            q_a, self._weight(a.q_b_proj if a.q_lora else a.q_proj), self._weight(a.kv_a_proj_with_mqa),
            self._weight(a.kv_b_proj), self._weight(a.o_proj),
            q_a_bias, self._bias(a.kv_a_proj_with_mqa), self._bias(a.o_proj),
            a.H, a.N, a.R, a.V, a.interleaved, a.scale,
        )  # fmt: skip

    def _feed_forward(self, mlp: MoE | MLP, norm: structs.CNorm) -> structs.CFeedForward:
        everyone = mlp.shared_experts if isinstance(mlp, MoE) else mlp
        part = structs.CFeedForward(norm)
        if everyone is not None:
            self._plain(everyone, MLP)
            part.gate, part.up = self._weight(everyone.gate_proj), self._weight(everyone.up_proj)
            part.down = self._weight(everyone.down_proj)
            if bytes(part.gate.layout) != bytes(part.up.layout):
                raise _Unfit
        if isinstance(mlp, MoE):
            part.router = self._router(mlp.gate)
            c.set_experts(part, self._experts(mlp.experts))
        return part

    def _router(self, router: Router) -> structs.CRouter:
        self._plain(router, Router)
        bias = router.e_score_correction_bias
        if router.G > c.MAX_GROUPS or (bias is not None and bias.dtype != torch.float32):
            raise _Unfit
        return structs.CRouter(
            c.weight(self._tensor(router._parameters, "weight")),
            structs.CVector() if bias is None else c.vector(self._tensor(router._buffers, "e_score_correction_bias")),
            router.K, router.G, router.kept_groups, 1 if bias is None else 2,
            router.scoring_func != "sigmoid", router.normalise, router.scaling,
        )  # fmt: skip

    def _experts(self, experts: RoutedExperts) -> cpu.ExpertTable:
        self._plain(experts, RoutedExperts)
        self.packs.append((vars(experts), experts.quantized))
        if experts.quantized is None:
            hung = experts._parameters
            stacks = (self._tensor(hung, name, *self.narrow) for name in ("gate_up_proj", "down_proj"))
            table: cpu.ExpertTable | None = cpu.ExpertTable.from_plain(*stacks)
        else:
            table = experts.quantized.table if experts.quantized.uniform else None
        if table is None:
            raise _Unfit
        self.alive.append(table)
        return table

    def _weight(self, linear: Linear) -> structs.CWeight:
        self._plain(linear, Linear)
        self.packs.append((vars(linear), linear.quantized))
        if linear.quantized is None:
            return c.weight(self._tensor(linear._parameters, "weight", *self.narrow))
        self._check(linear.quantized.values, self.dtype, *LOW_PRECISION)
        self.alive.append(linear.quantized)
        return c.weight(linear.quantized)

    def _bias(self, linear: Linear) -> structs.CVector:
        return structs.CVector() if linear.bias is None else c.vector(self._tensor(linear._parameters, "bias"))

    def _norm(self, norm: nn.Module) -> structs.CNorm:
        if type(norm) is not RMSNorm:
            raise _Unfit
        return structs.CNorm(c.vector(self._tensor(norm._parameters, "weight")), norm.eps)

    def _tensor(self, hung: dict[str, Any], name: str, *dtypes: torch.dtype) -> Tensor:
        """A tensor that the table points to; an alias keeps its memory, so that no other can come to lie there."""
        tensor = hung[name]
        self._check(tensor, *(dtypes or (torch.float32, torch.bfloat16)))
        self.places.append((hung, name))
        self.alive.append(tensor.detach())
        return tensor

    @staticmethod
    def _check(tensor: Tensor, *dtypes: torch.dtype) -> None:
        real = type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.is_contiguous()
        if not real or tensor.dtype not in dtypes:
            raise _Unfit

    def _plain(self, module: nn.Module, kind: type[nn.Module]) -> None:
        if type(module) is not kind or vars(module).get("backend", self.backend) is not self.backend:
            raise _Unfit


def _row_bytes(layer: structs.CLayer) -> int:
    """About what one row takes in a layer, as float32: its queries and heads, and of each expert it goes to the row and
    twice the hidden row."""
    a, f = layer.attention, layer.feed_forward
    heads, D = a.H * (2 * (a.N + a.R) + a.V), a.o.layout.O
    routed = f.router.K * (D + 2 * f.expert_in.O) if f.router.weight.layout.O else 0
    return 4 * max(heads + a.o.layout.I + 4 * D, 2 * D + 2 * f.gate.layout.O + routed)


def _fields(made: c.RoutingTensors) -> tuple[Tensor, ...]:
    return made.ids_MTK, made.weights_MTK, made.scores_MTE, made.biased_MTE, made.groups_MTG


_built: WeakKeyDictionary[nn.Module, _Builder] = WeakKeyDictionary()  # by the norm after the blocks
