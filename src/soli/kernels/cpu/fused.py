"""A pass of up to MOST_ROWS tokens through whole layers, or from ids to logits, in one C++ call (csrc/pass.h).

`Layer` and what it is made of are tables of addresses with the same fields as the structs of csrc/pass.h; weights stay
where they lie, in any of the five formats. Numerics: float32 between products; rows are rounded to bfloat16 only as
tokens of a product, into the cache and on leaving. A row has the same bits in any company.

Shapes: T rows, of which the first B are queries by themselves and N get logits; D hidden, W words of the vocabulary, M
layers with a router (in a page table: pages of a row), E experts, K chosen, G groups, P pages of S slots of X values.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, Structure, addressof, c_double, c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from soli.formats.quantized import QuantizedWeight, plain
from soli.kernels.cpu import ExpertTable, native

MOST_ROWS: Final = 512  # as in csrc/pass.h
MOST_GROUPS: Final = 64


class Vector(Structure):
    _fields_ = (("data", c_void_p), ("dtype", c_int64))


class Norm(Structure):
    _fields_ = (("weight", Vector), ("eps", c_double))


class Matrix(Structure):
    _fields_ = (("weight", c_void_p), ("scale", c_void_p))


class Layout(Structure):
    _fields_ = (("format", c_int64), ("O", c_int64), ("I", c_int64), ("group", c_int64))


class Weight(Structure):
    _fields_ = (("matrix", Matrix), ("layout", Layout))


class Attention(Structure):
    _fields_ = (
        *((name, Norm) for name in ("norm", "q_norm", "kv_norm")),
        *((name, Weight) for name in ("q_a", "q_b", "kv_a", "kv_b", "o")),
        *((name, Vector) for name in ("q_a_bias", "kv_a_bias", "o_bias")),
        *((name, c_int64) for name in ("H", "N", "R", "V", "interleaved")),
        ("scale", c_double),
    )


class Router(Structure):
    _fields_ = (
        ("weight", Weight),
        ("bias", Vector),
        *((name, c_int64) for name in ("K", "G", "kept", "best", "softmax", "normalise")),
        ("scaling", c_double),
    )


class FeedForward(Structure):
    _fields_ = (
        ("norm", Norm),
        *((name, Weight) for name in ("gate", "up", "down")),
        ("router", Router),
        *(("expert_in", Layout), ("expert_out", Layout)),
        ("experts", c_void_p),
    )


class Layer(Structure):
    _fields_ = (("attention", Attention), ("feed_forward", FeedForward))


class Chunk(Structure):
    _fields_ = (*((name, c_int64) for name in ("start", "stop", "first")), ("slots", c_void_p))


class Call(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("isa", "dtype", "threads", "T", "D", "count")),
        *((name, c_void_p) for name in ("layers", "pages")),
        *((name, c_int64) for name in ("P", "S", "M", "singles", "chunk_count")),
        *((name, c_void_p) for name in ("table", "lengths", "chunks", "positions", "frequencies")),
        ("cos_sin_scale", c_double),
        ("x", Vector),
        ("words", c_void_p),
        ("norm", Norm),
        ("y", c_void_p),
        ("head", Weight),
        ("ends", c_void_p),
        *((name, c_int64) for name in ("end_count", "W")),
        *((name, c_void_p) for name in ("logits", "muted")),
        *((name, c_void_p) for name in ("ids", "weights", "scores", "biased", "groups")),
    )


def vector(tensor: Tensor | None) -> Vector:
    """A contiguous float32 or bfloat16 vector where it lies; without a tensor there is none."""
    return Vector() if tensor is None else Vector(tensor.data_ptr(), native.DTYPES[tensor.dtype])


def weight(matrix: QuantizedWeight | Tensor | None) -> Weight:
    """A matrix (O, I) where it lies; without one there is none."""
    if matrix is None:
        return Weight()
    quantized = plain(matrix) if isinstance(matrix, Tensor) else matrix
    O, I = quantized.shape  # noqa: E741
    scale = 0 if quantized.scale is None else quantized.scale.data_ptr()
    layout = Layout(native.FORMATS[quantized.format], O, I, quantized.group)
    return Weight(Matrix(quantized.weight.data_ptr(), scale), layout)


def set_experts(part: FeedForward, table: ExpertTable) -> None:
    """Give a layer its routed experts. `table` must outlive `part`."""
    _, D, F = table.shape
    (in_format, in_group), (out_format, out_group) = table.gate_up, table.down
    part.expert_in = Layout(native.FORMATS[in_format], F, D, in_group)
    part.expert_out = Layout(native.FORMATS[out_format], D, F, out_group)
    part.experts = table.addresses_3E2.data_ptr()


@dataclass(frozen=True)
class Decisions:
    """What the routers decided, a layer with a router after another: the fields of soli.model.router.Routing."""

    ids_MTK: Tensor
    weights_MTK: Tensor
    scores_MTE: Tensor
    biased_MTE: Tensor
    groups_MTG: Tensor


@dataclass(frozen=True)
class Table:
    """A run of layers and the norm after them; `alive` keeps their memory."""

    layers: Array[Layer]
    norm: Norm
    frequencies_R: Tensor  # float32 (R / 2) radians per position
    cos_sin_scale: float
    alive: tuple[object, ...]

    @cached_property
    def routed(self) -> tuple[int, int, int, int]:
        """Of the layers that have a router, M, and E, K, G of each."""
        routers = [layer.feed_forward.router for layer in self.layers if layer.feed_forward.router.weight.layout.O]
        return (len(routers), routers[0].weight.layout.O, routers[0].K, routers[0].G) if routers else (0, 0, 0, 0)


@dataclass(frozen=True)
class Rows:
    """Where T rows stand. Of the first B, row b attends to its first lengths_B[b] slots (int32), of which the last is
    its own and is written; slot s is slot s % S of page table_BM[b, s // S] (int32). The others come in chunks of
    (start, stop, first, slots): rows start ... stop - 1 are one text's, from place `first` on, and `slots` (int64, of
    the flattened pages) says where its places lie, up to its last row's. Positions (int64) turn queries and keys."""

    positions_T: Tensor
    table_BM: Tensor
    lengths_B: Tensor
    chunks: Sequence[tuple[int, int, int, Tensor]] = ()


@dataclass(frozen=True)
class Words:
    """A model's two ends: the embedding (W, D) and the head (W, D), `quantized` or plain; the caller keeps them."""

    embedding: Vector
    head: Weight
    quantized: bool
    shape: tuple[int, int]


def run(
    table: Table, x_TD: Tensor, rows: Rows, pages: Sequence[Tensor], muted: Sequence[Tensor | None] = ()
) -> tuple[Tensor, Decisions]:
    """Rows (T, D) to their normed output in the same dtype, with every router's decision.

    `pages` (P, S, X) of each layer, in the dtype of x. Rows may share pages: all slots of a layer are written before
    any is read. Chunks attend in the expanded way, the other rows in the absorbed one. `muted` has for each layer bool
    (T, E), the experts that must not play, or None; empty, all may. IndexError for a slot that lies in no page.
    """
    x_TD, y_TD = x_TD.contiguous(), torch.empty_like(x_TD)
    call = Call(T=len(x_TD), D=x_TD.shape[1], dtype=native.DTYPES[x_TD.dtype], x=vector(x_TD), y=y_TD.data_ptr())
    return y_TD, _pass(call, table, x_TD.dtype, rows, pages, muted)


def read(
    table: Table,
    words: Words,
    ids_T: Tensor,
    ends: Sequence[int],
    rows: Rows,
    pages: Sequence[Tensor],
    muted: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor, Decisions]:
    """The same from token ids (int64), with logits (N, W) of the rows `ends`: float32, rounded to the dtype of the rows
    and pages. Logits, normed output, decisions; IndexError too for an id that the vocabulary does not have."""
    T, N, (W, D), dtype = len(ids_T), len(ends), words.shape, pages[0].dtype
    if ids_T.dtype != torch.int64 or not ids_T.is_contiguous() or not all(0 <= end < T for end in ends):
        raise ValueError(f"ids {ids_T.dtype} {tuple(ids_T.shape)} and ends {tuple(ends)} do not fit")
    y_TD, logits_NW, wanted = torch.empty(T, D, dtype=dtype), torch.empty(N, W), (c_int64 * N)(*ends)
    call = Call(
        T=T, D=D, dtype=native.DTYPES[dtype], x=words.embedding, words=ids_T.data_ptr(), y=y_TD.data_ptr(),
        head=words.head, ends=addressof(wanted), end_count=N, W=W, logits=logits_NW.data_ptr(),
    )  # fmt: skip
    return logits_NW, y_TD, _pass(call, table, dtype, rows, pages, muted)


def _pass(
    call: Call,
    table: Table,
    dtype: torch.dtype,
    rows: Rows,
    pages: Sequence[Tensor],
    muted: Sequence[Tensor | None],
) -> Decisions:
    """Complete a call, and make it."""
    kernels = native.library()
    assert kernels is not None
    _check(table, call.T, dtype, rows, pages, muted)
    found, lying, silent = _unmade(table.routed, call.T), _addresses(pages), _addresses(muted)
    chunks = (Chunk * len(rows.chunks))(*(Chunk(*part, slots.data_ptr()) for *part, slots in rows.chunks))
    call.isa, call.threads = native.chosen_isa(kernels.best_isa), torch.get_num_threads()
    call.count, call.layers, call.norm = len(table.layers), addressof(table.layers), table.norm
    call.frequencies, call.cos_sin_scale = table.frequencies_R.data_ptr(), table.cos_sin_scale
    (call.P, call.S, _), call.pages = pages[0].shape, addressof(lying)
    call.singles, call.M = rows.table_BM.shape
    call.table, call.lengths, call.positions = (x.data_ptr() for x in (rows.table_BM, rows.lengths_B, rows.positions_T))
    call.chunk_count, call.chunks = len(chunks), addressof(chunks)
    call.muted = addressof(silent) if muted else None
    call.ids, call.weights, call.groups = (x.data_ptr() for x in (found.ids_MTK, found.weights_MTK, found.groups_MTG))
    call.scores, call.biased = found.scores_MTE.data_ptr(), found.biased_MTE.data_ptr()
    native.check_code(kernels.run_pass(addressof(call)))
    return found


def _addresses(tensors: Sequence[Tensor | None]) -> Array[c_void_p]:
    return (c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def _unmade(routed: tuple[int, int, int, int], T: int) -> Decisions:
    """Memory for T rows' decisions."""
    M, E, K, G = routed
    ids, weights = torch.empty(M, T, K, dtype=torch.int64), torch.empty(M, T, K)
    return Decisions(ids, weights, torch.empty(M, T, E), torch.empty(M, T, E), torch.empty(M, T, G, dtype=torch.bool))


def _check(
    table: Table, T: int, dtype: torch.dtype, rows: Rows, pages: Sequence[Tensor], muted: Sequence[Tensor | None]
) -> None:
    """What C++ will believe; ValueError where it would be wrong."""
    B, like = len(rows.lengths_B), pages[0]
    wanted: list[tuple[Tensor, torch.dtype, Sequence[int]]] = [(page, dtype, like.shape) for page in pages]
    wanted += [(rows.positions_T, torch.int64, (T,)), (rows.lengths_B, torch.int32, (B,))]
    wanted += [(rows.table_BM, torch.int32, (B, rows.table_BM.shape[-1]))]
    for start, stop, first, slots in rows.chunks:
        wanted.append((slots, torch.int64, (max(len(slots), first + stop - start),)))
    for layer, part in zip(table.layers, muted, strict=True) if muted else ():
        if part is not None:
            wanted.append((part, torch.bool, (T, layer.feed_forward.router.weight.layout.O)))
    for tensor, dtype, shape in wanted:
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{tensor.dtype} {tuple(tensor.shape)} is no contiguous {dtype} {tuple(shape)}")
    if T > MOST_ROWS or len(pages) != len(table.layers):
        raise ValueError(f"{T} rows and pages for {len(pages)} layers do not fit a table of {len(table.layers)}")
