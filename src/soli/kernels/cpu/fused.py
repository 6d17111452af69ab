"""The fused forward: up to MAX_TOKENS tokens through all layers, or from ids to logits, in C++ at once.

A `CLayer` is a table of addresses: weights stay in place, in any of the five formats. Numerics: float32 between
products; hidden states are rounded to bfloat16 only as inputs of a product, into the cache and in the result. Results
are batch-invariant: a token has the same bits whatever it is computed with. The C++ side is csrc/forward.cpp.

Shapes: T tokens, of which the first B are decode tokens and N get logits; D hidden, V vocabulary, M layers with a
router, E experts, K chosen, G groups; P KV blocks of S slots of X values; W blocks of a block table's row.
"""

from collections.abc import Sequence
from ctypes import Array, addressof, c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor

from soli.analysis.residency import PassResidency
from soli.formats.quantized import QuantizedWeight, plain
from soli.kernels.cpu import ExpertTable, native
from soli.kernels.cpu.paged_pass import ExpertPager, PagedPass
from soli.kernels.cpu.structs import (
    CFeedForward,
    CForwardArgs,
    CLayer,
    CLayout,
    CMatrix,
    CNorm,
    CPrefillChunk,
    CRoutings,
    CVector,
    CWeight,
)

MAX_TOKENS: Final = 8192  # as in csrc/forward_args.h
MAX_GROUPS: Final = 64
MAX_SLOTS: Final = 2**31 - 1  # of sparse attention, as csrc/forward_sparse.h stores them


def vector(tensor: Tensor | None) -> CVector:
    """The address of a contiguous float32 or bfloat16 vector; of none without a tensor."""
    return CVector() if tensor is None else CVector(tensor.data_ptr(), native.DTYPES[tensor.dtype])


def weight(matrix: QuantizedWeight | Tensor | None) -> CWeight:
    """The address and layout of a matrix (O, I); of none without a matrix."""
    if matrix is None:
        return CWeight()
    quantized = plain(matrix) if isinstance(matrix, Tensor) else matrix
    O, I = quantized.shape  # noqa: E741
    scale = 0 if quantized.scale is None else quantized.scale.data_ptr()
    layout = CLayout(native.FORMATS[quantized.format], O, I, quantized.group)
    return CWeight(CMatrix(quantized.values.data_ptr(), scale), layout)


def set_experts(feed_forward: CFeedForward, table: ExpertTable) -> None:
    """Give a layer its routed experts. `table` must outlive `feed_forward`."""
    states = table.states_E
    feed_forward.states = None if states is None else states.data_ptr()
    _, D, F = table.shape
    in_format, in_group = table.gate_up
    out_format, out_group = table.down
    feed_forward.expert_in = CLayout(native.FORMATS[in_format], F, D, in_group)
    feed_forward.expert_out = CLayout(native.FORMATS[out_format], D, F, out_group)
    feed_forward.experts = table.addresses_3E2.data_ptr()


class RoutingTensors(NamedTuple):
    """The routers' decisions, one layer with a router after another: the fields of soli.model.router.Routings."""

    ids_MTK: Tensor
    weights_MTK: Tensor
    scores_MTE: Tensor
    biased_MTE: Tensor
    groups_MTG: Tensor
    residency: tuple[PassResidency, ...] = ()  # of this pass, where experts are read from disk

    @classmethod
    def empty(cls, table: "LayerTable", T: int) -> Self:
        """Memory for T tokens."""
        M, E, K, G = table.routing_shape
        ids_MTK = torch.empty(M, T, K, dtype=torch.int64)
        groups_MTG = torch.empty(M, T, G, dtype=torch.bool)
        scores_MTE, biased_MTE = torch.empty(2, M, T, E)
        residency = (PassResidency.empty(T, table.expert_bytes_ME),) if any(table.paged_experts) else ()
        return cls(ids_MTK, torch.empty(M, T, K), scores_MTE, biased_MTE, groups_MTG, residency)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Those of consecutive tokens."""
        ids_MTK, weights_MTK, scores_MTE, biased_MTE, groups_MTG = (
            torch.cat(tensors, 1) for tensors in zip(*(part[:5] for part in parts), strict=True)
        )
        residency = tuple(one for part in parts for one in part.residency)
        return cls(ids_MTK, weights_MTK, scores_MTE, biased_MTE, groups_MTG, residency)

    def addresses(self) -> CRoutings:
        """Where the C++ code writes."""
        *tensors, residency = self
        recorded = [tensor for one in residency for tensor in (one.states_ME, one.waited_M)]
        return CRoutings(*(tensor.data_ptr() for tensor in (*tensors, *recorded)))


@dataclass(frozen=True)
class LayerTable:
    """Consecutive layers and the norm after them; `keep_alive` holds references to their memory."""

    isa: int  # as native.ISAS numbers it
    layers: Array[CLayer]
    norm: CNorm
    frequencies_R: Tensor  # float32 (R / 2) radians per position
    cos_sin_scale: float
    query_scaling: tuple[float, int]  # beta and original length of llama_4_scaling; (0, 1) for none
    keep_alive: tuple[object, ...]
    paged_experts: Sequence[ExpertPager | None] = ()  # for each layer whose experts are not all in memory

    @cached_property
    def routing_shape(self) -> tuple[int, int, int, int]:
        """M, the number of layers that have a router, and E, K, G of each."""
        routers = [layer.feed_forward.router for layer in self.layers if layer.feed_forward.router.weight.layout.O]
        return (len(routers), routers[0].weight.layout.O, routers[0].K, routers[0].G) if routers else (0, 0, 0, 0)

    @cached_property
    def expert_bytes_ME(self) -> Tensor:
        """The bytes that are read for each expert, where all layers that have a router are paged."""
        return torch.stack([experts.expert_bytes_E for experts in self.paged_experts if experts is not None])

    @cached_property
    def router_index(self) -> list[int]:
        """For each layer, how many layers before it have a router."""
        has_router = (layer.feed_forward.router.weight.layout.O > 0 for layer in self.layers)
        return [*accumulate(has_router, initial=0)]


@dataclass(frozen=True)
class AttentionMetadata:
    """Positions of T tokens and the slots that they attend to and write.

    Decode token b attends to the first lengths_B[b] slots (int32) of its sequence, of which the last is its own; slot s
    is slot s % S of KV block block_table_BW[b, s // S] (int32). The tokens after those come in chunks
    (start, stop, first_position, slots): tokens start ... stop - 1 are consecutive tokens of one sequence, the first at
    first_position, and `slots` (int64) has the slot of each position up to the last, in the flattened KV blocks.
    Positions (int64) are those of the rotary embedding.
    """

    positions_T: Tensor
    block_table_BW: Tensor
    lengths_B: Tensor
    chunks: Sequence[tuple[int, int, int, Tensor]] = ()


@dataclass(frozen=True)
class EmbeddingAndHead:
    """A model's embedding (V, D) and head (V, D), `quantized` or plain; the caller keeps them alive."""

    embedding: CVector
    head: CWeight
    quantized: bool
    shape: tuple[int, int]


def forward_hidden(
    table: LayerTable,
    x_TD: Tensor,
    metadata: AttentionMetadata,
    kv_blocks: Sequence[Tensor],
    masked_experts: Sequence[Tensor | None] = (),
    index_keys: Sequence[Tensor | None] = (),
) -> tuple[Tensor, RoutingTensors]:
    """Hidden states (T, D) through the layers and the norm, in the same dtype, and every router's decision.

    `kv_blocks`: for each layer (P, S, X), in the dtype of x. Sequences may share blocks: all slots of a layer are
    written before any is read. Chunks use expanded attention, decode tokens absorbed attention. `masked_experts`: for
    each layer bool (T, E), the experts that must not be selected, or None; empty for no masks. `index_keys`: for each
    layer the indexer's keys (P, S, I), or None; empty without sparse attention. IndexError for a slot outside the KV
    blocks.
    """
    x_TD = x_TD.contiguous()
    return _forward(table, x_TD.shape, x_TD.dtype, metadata, kv_blocks, masked_experts, index_keys, x=vector(x_TD))


def forward_ids(
    table: LayerTable,
    embedding_and_head: EmbeddingAndHead,
    ids_T: Tensor,
    logit_indices: Sequence[int],
    metadata: AttentionMetadata,
    kv_blocks: Sequence[Tensor],
    masked_experts: Sequence[Tensor | None] = (),
    index_keys: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor, RoutingTensors]:
    """The same from token ids (int64): logits (N, V) of the tokens `logit_indices`, normed hidden states, decisions.

    Logits are float32, rounded to the dtype of the KV blocks. IndexError too for an id that is not in the vocabulary.
    """
    T, N = len(ids_T), len(logit_indices)
    V, D = embedding_and_head.shape
    dtype = kv_blocks[0].dtype
    if ids_T.dtype != torch.int64 or not ids_T.is_contiguous() or not all(0 <= index < T for index in logit_indices):
        raise ValueError(f"ids {ids_T.dtype} {tuple(ids_T.shape)} and logit indices {tuple(logit_indices)} do not fit")
    logits_NV = torch.empty(N, V)
    c_indices = (c_int64 * N)(*logit_indices)
    y_TD, routing = _forward(
        table, (T, D), dtype, metadata, kv_blocks, masked_experts, index_keys,
        x=embedding_and_head.embedding, token_ids=ids_T.data_ptr(), head=embedding_and_head.head,
        logit_indices=addressof(c_indices), logit_count=N, vocab_size=V, logits=logits_NV.data_ptr(),
    )  # fmt: skip
    return logits_NV, y_TD, routing


def _forward(
    table: LayerTable,
    shape: Sequence[int],
    dtype: torch.dtype,
    metadata: AttentionMetadata,
    kv_blocks: Sequence[Tensor],
    masked_experts: Sequence[Tensor | None],
    index_keys: Sequence[Tensor | None],
    **tokens: Any,
) -> tuple[Tensor, RoutingTensors]:
    """Hidden states of `shape` (T, D), and decisions. `tokens`: the fields of CForwardArgs that hold hidden states or
    token ids, and those of the logits."""
    kernels = native.library()
    assert kernels is not None
    T, D = shape
    _check(table, T, dtype, metadata, kv_blocks, masked_experts)
    _check_index_keys(table, dtype, kv_blocks, index_keys)
    y_TD = torch.empty(T, D, dtype=dtype)
    routing = RoutingTensors.empty(table, T)
    block_addresses = _addresses(kv_blocks)
    mask_addresses = _addresses(masked_experts)
    key_addresses = _addresses(index_keys)
    chunks = [CPrefillChunk(*bounds, slots.data_ptr()) for *bounds, slots in metadata.chunks]
    c_chunks = (CPrefillChunk * len(chunks))(*chunks)
    P, S, _ = kv_blocks[0].shape
    B, W = metadata.block_table_BW.shape
    args = CForwardArgs(
        isa=table.isa, dtype=native.DTYPES[dtype], threads=torch.get_num_threads(), T=T, D=D, y=y_TD.data_ptr(),
        layer_count=len(table.layers), layers=addressof(table.layers), norm=table.norm,
        frequencies=table.frequencies_R.data_ptr(), cos_sin_scale=table.cos_sin_scale,
        query_scaling=table.query_scaling[0], query_scaling_length=table.query_scaling[1],
        kv_blocks=addressof(block_addresses), index_keys=addressof(key_addresses) if index_keys else None,
        block_count=P, block_size=S,
        num_decode_tokens=B, blocks_per_sequence=W, block_table=metadata.block_table_BW.data_ptr(),
        lengths=metadata.lengths_B.data_ptr(), positions=metadata.positions_T.data_ptr(),
        chunk_count=len(chunks), chunks=addressof(c_chunks),
        masked_experts=addressof(mask_addresses) if masked_experts else None,
        routings=routing.addresses(), **tokens,
    )  # fmt: skip
    if any(table.paged_experts):
        PagedPass(kernels, args, table.paged_experts, table.router_index, routing.ids_MTK, *routing.residency).run()
    else:
        native.check_error(kernels.forward(addressof(args)))
    return y_TD, routing


def _addresses(tensors: Sequence[Tensor | None]) -> Array[c_void_p]:
    return (c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def _check(
    table: LayerTable,
    T: int,
    dtype: torch.dtype,
    metadata: AttentionMetadata,
    kv_blocks: Sequence[Tensor],
    masked_experts: Sequence[Tensor | None],
) -> None:
    """ValueError for dtypes, shapes and strides that the C++ code relies on and that are wrong."""
    B = len(metadata.lengths_B)
    masked = zip(table.layers, masked_experts, strict=True) if masked_experts else ()
    required: list[tuple[Tensor, torch.dtype, Sequence[int]]] = [  # each tensor with the dtype and shape it must have
        *((blocks_PSX, dtype, kv_blocks[0].shape) for blocks_PSX in kv_blocks),
        (metadata.positions_T, torch.int64, (T,)),
        (metadata.lengths_B, torch.int32, (B,)),
        (metadata.block_table_BW, torch.int32, (B, metadata.block_table_BW.shape[-1])),
        *(
            (slots, torch.int64, (max(len(slots), first_position + stop - start),))
            for start, stop, first_position, slots in metadata.chunks
        ),
        *(
            (mask, torch.bool, (T, layer.feed_forward.router.weight.layout.O))
            for layer, mask in masked
            if mask is not None
        ),
    ]
    for tensor, required_dtype, shape in required:
        if tensor.dtype != required_dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{tensor.dtype} {tuple(tensor.shape)} is no contiguous {required_dtype} {tuple(shape)}")
    if T > MAX_TOKENS or len(kv_blocks) != len(table.layers):
        raise ValueError(f"{T} tokens and KV blocks of {len(kv_blocks)} layers do not fit {len(table.layers)} layers")


def _check_index_keys(
    table: LayerTable, dtype: torch.dtype, kv_blocks: Sequence[Tensor], index_keys: Sequence[Tensor | None]
) -> None:
    """ValueError where a layer with an indexer has no keys, or ones that the C++ code cannot take."""
    widths = [layer.attention.index_k.layout.O for layer in table.layers]
    for width, keys_PSI in zip(widths, index_keys or [None] * len(widths), strict=True):
        shape = (*kv_blocks[0].shape[:2], width)
        fits = keys_PSI is not None and keys_PSI.dtype == dtype and keys_PSI.shape == shape and keys_PSI.is_contiguous()
        if width and not fits:
            raise ValueError(f"the indexer's keys are no contiguous {dtype} {shape}")
        if width and shape[0] * shape[1] > MAX_SLOTS:
            raise ValueError(f"sparse attention numbers slots with 32 bits, and there are {shape[0] * shape[1]:,}")
