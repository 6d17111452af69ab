"""The tables of addresses that the fused forward takes, made from the modules of a model.

Weights stay in place, in any of the five formats. `Unsupported` names the module that C++ cannot compute, and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from soli.engine.scratch import tokens_per_call
from soli.experts.paged import PagedExperts
from soli.kernels import Backend, Dispatch, cpu
from soli.kernels.cpu import fused, structs
from soli.kernels.cpu.backend import LOW_PRECISION, CpuBackend
from soli.model.attention import LatentAttention
from soli.model.cache import Cache
from soli.model.indexer import Indexer
from soli.model.layers import MLP, Linear, RMSNorm
from soli.model.moe import MoE, RoutedExperts
from soli.model.router import Router, Routings
from soli.model.transformer import Block, Transformer

Masks = Mapping[int, Tensor]
NORM_DTYPES: Final = (torch.float32, torch.bfloat16)


class Unsupported(Exception):
    """The fused forward cannot compute a module. `str()` names it and the reason."""


class FusedLayers:
    """Consecutive blocks and the norm after them, for hidden states of `dtype`."""

    def __init__(self, builder: LayerTableBuilder, blocks: Sequence[Block], norm: RMSNorm) -> None:
        self.table = builder.layer_table(blocks, norm)
        token_bytes = max(_bytes_per_token(layer) for layer in self.table.layers)
        self.max_tokens = tokens_per_call(token_bytes, paged=any(self.table.paged_experts))
        self._width = blocks[0].self_attn.C + blocks[0].self_attn.R
        self._layers = [block.self_attn.layer for block in blocks]  # as the cache numbers them
        self._indexers = [block.self_attn.indexer for block in blocks]
        self._like = torch.empty(0, dtype=builder.dtype)

    def forward(
        self, x_TD: Tensor, positions_T: Tensor, cache: Cache, masked_experts: Masks | None = None
    ) -> tuple[Tensor, Routings]:
        """Normed hidden states (T, D) and every router's decision, in layer order."""
        kv_blocks, index_keys, masks = self.kv_blocks(cache), self.index_keys(cache), self.masks(masked_experts)
        outputs = []
        for start in range(0, len(x_TD), self.max_tokens):  # later tokens find the latents of earlier ones in the cache
            part = slice(start, min(start + self.max_tokens, len(x_TD)))
            metadata = _part_metadata(positions_T, cache, part)
            part_masks = [None if mask is None else mask[part] for mask in masks]
            outputs.append(fused.forward_hidden(self.table, x_TD[part], metadata, kv_blocks, part_masks, index_keys))
        hidden, routings = zip(*outputs, strict=True)
        if len(outputs) == 1:
            return hidden[0], Routings(*routings[0])
        return torch.cat(hidden), Routings(*fused.RoutingTensors.join(routings))

    def kv_blocks(self, cache: Cache) -> list[Tensor]:
        """Each layer's KV blocks."""
        return [cache.kv_blocks(layer, self._width, self._like) for layer in self._layers]

    def index_keys(self, cache: Cache) -> tuple[Tensor | None, ...]:
        """The keys of each layer's indexer, None for a layer without; () without sparse attention."""
        if not any(self._indexers):
            return ()
        return tuple(
            None if indexer is None else cache.kv_blocks(indexer.layer, indexer.I, self._like, "index_key")
            for indexer in self._indexers
        )

    def masks(self, masked_experts: Masks | None) -> tuple[Tensor | None, ...]:
        """A mask or None for each layer; () without masks."""
        if not masked_experts:
            return ()
        return tuple(masked_experts[at].contiguous() if at in masked_experts else None for at in self._layers)


class LayerTableBuilder:
    """Writes modules of `model` as C structs. Unsupported where one cannot be computed in C++."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._keep_alive: list[object] = []
        embedding = model.embed_tokens
        self.dtype = model.compute_dtype or embedding.weight.dtype  # of hidden states
        # A float32 master under bfloat16 activations is torch's: it rounds the weight before a product.
        self._weight_dtypes = (self.dtype, torch.bfloat16)
        first = model.layers[0]
        assert isinstance(first, Block)
        self._backend: Backend = first.self_attn.backend
        self.cpu_backend = self._cpu_backend(first.self_attn, embedding)

    def layer_table(self, blocks: Sequence[Block], norm: RMSNorm) -> fused.LayerTable:
        layers = (structs.CLayer * len(blocks))(*(self._layer(block) for block in blocks))
        rope = self._model.rope
        queries = rope.query_scaling
        return fused.LayerTable(
            self.cpu_backend.isa,
            layers,
            self._norm(norm),
            rope.inv_P,
            rope.scale,
            (0.0, 1) if queries is None else (queries.beta, queries.original_max_position_embeddings),
            tuple(self._keep_alive),
            tuple(_paged_experts(block) for block in blocks),
        )

    def embedding_and_head(self) -> fused.EmbeddingAndHead | None:
        """None where torch must compute the embedding or the head: another backend, a bias, other dtypes or shapes."""
        embedding, head = self._model.embed_tokens, self._model.lm_head
        shape = head.out_features, head.in_features
        if head.bias is not None or embedding.weight.shape != shape:
            return None
        try:
            rows = fused.vector(self._tensor(embedding, "weight", self.dtype))
            return fused.EmbeddingAndHead(rows, self._weight(head), head.quantized is not None, shape)
        except Unsupported:
            return None

    def _cpu_backend(self, attention: LatentAttention, embedding: nn.Embedding) -> CpuBackend:
        if not isinstance(self._backend, Dispatch):
            raise self._unsupported(attention, f"computes with {type(self._backend).__name__}")
        if not embedding.weight.is_cpu:
            raise self._unsupported(embedding, f"is on {embedding.weight.device}, and the fused forward runs on a CPU")
        backend = self._backend.fused(torch.empty(0, dtype=self.dtype))
        if backend is None:
            forced = self._backend.forced_backend
            raise Unsupported(
                f"SOLI_KERNELS is {forced}" if forced else f"there are no C++ kernels here for {self.dtype}"
            )
        return backend

    def _layer(self, block: Block) -> structs.CLayer:
        attention = self._attention(block.self_attn, self._norm(block.input_layernorm))
        feed_forward = self._feed_forward(block.mlp, self._norm(block.post_attention_layernorm))
        if block.post_mlp_layernorm is not None:
            feed_forward.output_norm = self._norm(block.post_mlp_layernorm)
        return structs.CLayer(attention, feed_forward)

    def _attention(self, a: LatentAttention, norm: structs.CNorm) -> structs.CAttention:
        self._check_backend(a)
        q_norm, q_a, q_a_bias = structs.CNorm(), structs.CWeight(), structs.CVector()
        if a.q_lora:
            q_norm, q_a, q_a_bias = self._norm(a.q_a_layernorm), self._weight(a.q_a_proj), self._bias(a.q_a_proj)
        attention = structs.CAttention(
            norm, q_norm, self._norm(a.kv_a_layernorm),
            q_a, self._weight(a.q_b_proj if a.q_lora else a.q_proj), self._weight(a.kv_a_proj_with_mqa),
            self._weight(a.kv_b_proj), self._weight(a.o_proj),
            q_a_bias, self._bias(a.kv_a_proj_with_mqa), self._bias(a.o_proj),
            a.H, a.N, a.R, a.V, a.interleaved, a.scale, a.topk or 0,
        )  # fmt: skip
        if a.indexer is not None:
            self._set_indexer(attention, a.indexer)
        return attention

    def _set_indexer(self, attention: structs.CAttention, indexer: Indexer) -> None:
        attention.index_q, attention.index_k = self._weight(indexer.wq_b), self._weight(indexer.wk)
        heads = indexer.weights_proj
        if heads.quantized is None:  # its inputs are float32, whatever the dtype of hidden states is
            attention.index_weights = fused.weight(self._tensor(heads, "weight", *NORM_DTYPES))
        else:
            attention.index_weights = self._weight(heads)
        norm = indexer.k_norm
        attention.index_norm = structs.CNorm(fused.vector(self._tensor(norm, "weight", *NORM_DTYPES)), norm.eps)
        attention.index_norm_bias = fused.vector(self._tensor(norm, "bias", *NORM_DTYPES))
        attention.J, attention.index_interleaved = indexer.J, indexer.interleaved

    def _feed_forward(self, mlp: MoE | MLP, norm: structs.CNorm) -> structs.CFeedForward:
        feed_forward = structs.CFeedForward(norm)
        dense = mlp.shared_experts if isinstance(mlp, MoE) else mlp
        if dense is not None:
            feed_forward.gate, feed_forward.up = self._weight(dense.gate_proj), self._weight(dense.up_proj)
            feed_forward.down = self._weight(dense.down_proj)
            if bytes(feed_forward.gate.layout) != bytes(feed_forward.up.layout):
                raise self._unsupported(dense, "has a gate and an up projection of different formats")
        if isinstance(mlp, MoE):
            feed_forward.router = self._router(mlp.gate)
            fused.set_experts(feed_forward, self._experts(mlp.experts))
        return feed_forward

    def _router(self, router: Router) -> structs.CRouter:
        if router.G > fused.MAX_GROUPS:
            raise self._unsupported(router, f"has {router.G} groups, more than {fused.MAX_GROUPS}")
        has_bias = router.e_score_correction_bias is not None
        bias_E = self._tensor(router, "e_score_correction_bias", torch.float32) if has_bias else None
        return structs.CRouter(
            fused.weight(self._tensor(router, "weight", torch.float32, torch.bfloat16)), fused.vector(bias_E),
            router.K, router.G, router.kept_groups, router.experts_per_group_score,
            router.scoring_func != "sigmoid", router.normalise, router.scaling,
        )  # fmt: skip

    def _experts(self, experts: RoutedExperts) -> cpu.ExpertTable:
        self._check_backend(experts)
        if experts.quantized is None:
            stacks = (self._tensor(experts, name, *self._weight_dtypes) for name in ("gate_up_proj", "down_proj"))
            table = cpu.ExpertTable.from_plain(*stacks)
        elif experts.quantized.uniform:
            self._check_format(experts, *experts.quantized.formats)
            table = experts.quantized.table
        else:
            raise self._unsupported(experts, "has experts of different formats")
        self._keep_alive.append(table)
        return table

    def _weight(self, linear: Linear) -> structs.CWeight:
        self._check_backend(linear)
        if linear.quantized is None:
            return fused.weight(self._tensor(linear, "weight", *self._weight_dtypes))
        self._check_format(linear, linear.quantized.format)
        self._check_tensor(linear, "weight", linear.quantized.values, self.dtype, *LOW_PRECISION)
        self._keep_alive.append(linear.quantized)
        return fused.weight(linear.quantized)

    def _bias(self, linear: Linear) -> structs.CVector:
        bias = None if linear.bias is None else self._tensor(linear, "bias", torch.float32, torch.bfloat16)
        return fused.vector(bias)

    def _norm(self, norm: RMSNorm) -> structs.CNorm:
        return structs.CNorm(fused.vector(self._tensor(norm, "weight", *NORM_DTYPES)), norm.eps)

    def _tensor(self, module: nn.Module, name: str, *dtypes: torch.dtype) -> Tensor:
        """A tensor for the table, kept alive by an alias."""
        tensor: Tensor = getattr(module, name)
        self._check_tensor(module, name, tensor, *dtypes)
        self._keep_alive.append(tensor.detach())
        return tensor

    def _check_tensor(self, module: nn.Module, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
        if type(tensor) not in (Tensor, nn.Parameter):
            raise self._unsupported(module, f"has a {type(tensor).__name__} as its {name}")
        if not tensor.is_cpu:
            raise self._unsupported(module, f"has its {name} on {tensor.device}")
        if not tensor.is_contiguous():
            raise self._unsupported(module, f"has a {name} that is not contiguous")
        if tensor.dtype not in dtypes:
            raise self._unsupported(module, f"has a {name} of {tensor.dtype} beside hidden states of {self.dtype}")

    def _check_format(self, module: nn.Module, *formats: str) -> None:
        for format in formats:
            if not self.cpu_backend.supports_format(format):
                raise self._unsupported(module, f"has {format} weights, which the C++ kernels do not read")

    def _check_backend(self, module: LatentAttention | Linear | RoutedExperts) -> None:
        if module.backend is not self._backend:
            raise self._unsupported(module, f"computes with {type(module.backend).__name__}, not with the C++ kernels")

    def _unsupported(self, module: nn.Module, reason: str) -> Unsupported:
        return Unsupported(f"{self._names.get(id(module)) or 'the model'} {reason}")


def attention_metadata(positions_T: Tensor, cache: Cache) -> fused.AttentionMetadata:
    """Positions and slots of a whole step."""
    chunks = [(chunk.start, chunk.stop, chunk.first, chunk.slots_S) for chunk in cache.chunks]
    return fused.AttentionMetadata(positions_T, cache.table_BM, cache.lengths_B, chunks)


def _part_metadata(positions_T: Tensor, cache: Cache, part: slice) -> fused.AttentionMetadata:
    """The same for some of a step's tokens; a chunk on the border becomes two."""
    decode = slice(part.start, max(part.start, min(part.stop, cache.num_decode_tokens)))
    chunks = []
    for chunk in cache.chunks:
        start, stop = max(chunk.start, part.start), min(chunk.stop, part.stop)
        if start < stop:
            first = chunk.first + start - chunk.start
            chunks.append((start - part.start, stop - part.start, first, chunk.slots_S))
    table_BM = cache.table_BM[decode].contiguous()
    return fused.AttentionMetadata(positions_T[part], table_BM, cache.lengths_B[decode], chunks)


def _paged_experts(block: Block) -> PagedExperts | None:
    """A block's experts where they are read from disk as they are needed."""
    experts = block.mlp.experts.quantized if isinstance(block.mlp, MoE) else None
    return experts if isinstance(experts, PagedExperts) else None


def _bytes_per_token(layer: structs.CLayer) -> int:
    """About what one token takes in a layer, as float32: its queries and heads, and for each of its experts the input
    row and twice the hidden row."""
    a, f = layer.attention, layer.feed_forward
    heads, D = a.H * (2 * (a.N + a.R) + a.V) + a.topk + 2 * a.index_weights.layout.O, a.o.layout.O
    routed = f.router.K * (D + 2 * f.expert_in.O) if f.router.weight.layout.O else 0
    return 4 * max(heads + a.o.layout.I + 4 * D, 2 * D + 2 * f.gate.layout.O + routed)
