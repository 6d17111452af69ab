"""The seams in C++: products with weights of every format in place, and attention over latents in KV blocks.

For inference: no gradient is recorded. Numerics: activations are float32 or bfloat16 and results have their dtype.
Every dot product is summed in float32, in an order that depends on its length alone, so results are batch-invariant: a
token's result has the same bits alone and in any batch, with any number of threads. bfloat16 tokens use bfloat16
products where the processor has them (AVX-512 BF16), and beside int8 and int4 weights products of bytes, with tokens
rounded to 8 bits (AVX2 and later); elsewhere float32 products.

`isa`: the instruction set by its number in `native.ISAS`.

Shapes: T tokens, D hidden, E experts, F expert width, K chosen, O output and I input features; B sequences, H heads, P
KV blocks of S slots, M blocks of a table's row, X = C latent + R rotary width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from soli.errors import SoliError
from soli.formats.quantized import QuantizedWeight
from soli.kernels.cpu.native import DTYPES, FORMATS, Library, check_error, library

FORMAT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # of plain tensors
EXPERT_STATES = ("missing", "reading", "present", "failed")  # as enum ExpertState of csrc/paging.h
PLAIN = {dtype: FORMATS[name] for dtype, name in FORMAT_NAMES.items()}


def linear(isa: int, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., I), float32 or bfloat16, times weight (O, I) transposed: (..., O) in the dtype of x."""
    return _linear(isa, x, FORMATS[weight.format], weight.shape, weight.group, *_matrix_address(weight), bias)


def plain_linear(isa: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same for a contiguous float32 or bfloat16 matrix, with little overhead: small products are many."""
    return _linear(isa, x, PLAIN[weight.dtype], weight.shape, 0, weight.data_ptr(), 0, bias)


def _linear(
    isa: int,
    x: Tensor,
    format: int,
    shape: Sequence[int],
    group: int,
    weight: int,
    scale: int,
    bias: Tensor | None,
) -> Tensor:
    O, I = shape  # noqa: E741
    _check_tokens(x, I)
    if not x.is_contiguous():
        x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], O))
    kernels = require_library()
    code = kernels.linear(
        isa, format, O, I, group, weight, scale,
        y.numel() // max(O, 1), DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check_error(code)
    return y if bias is None else y + bias.to(x.dtype)


@dataclass(frozen=True, eq=False)
class ExpertTable:
    """The addresses of one layer's experts: for each its gate (F, D), up (F, D) and down (D, F), anywhere in memory.

    `addresses_3E2` int64 holds weight and scale of every gate, then every up, then every down; `keep_alive` holds
    references to their memory. Gate and up share format and group; down may have its own. `states_E` uint8 has an index
    into EXPERT_STATES for each expert of a layer whose experts are not all in memory.
    """

    gate_up: tuple[str, int]  # format, group
    down: tuple[str, int]
    shape: tuple[int, int, int]  # E, D, F
    addresses_3E2: Tensor
    keep_alive: tuple[object, ...]
    states_E: Tensor | None = None

    @classmethod
    def from_plain(cls, gate_up_E2FD: Tensor, down_EDF: Tensor) -> "ExpertTable":
        """Of stacked float32 or bfloat16 tensors, which the caller keeps alive."""
        if gate_up_E2FD.is_contiguous() and down_EDF.is_contiguous():
            dtypes = gate_up_E2FD.dtype, down_EDF.dtype
            shapes = gate_up_E2FD.shape, down_EDF.shape
            return _plain_table(gate_up_E2FD.data_ptr(), down_EDF.data_ptr(), *dtypes, *shapes)
        raise SoliError("stacked experts must be contiguous")

    @classmethod
    def from_matrices(
        cls, gates: Sequence[QuantizedWeight], ups: Sequence[QuantizedWeight], downs: Sequence[QuantizedWeight]
    ) -> Self:
        """Of separate matrices, as in a mapped file: one gate, up and down for each expert."""
        D, F = downs[0].shape
        kinds = [{(w.format, w.group, w.shape) for w in part} for part in ((*gates, *ups), downs)]
        if len(gates) != len(downs) or len(ups) != len(downs) or any(len(kind) != 1 for kind in kinds):
            raise SoliError("the experts of a layer must have the same number, shape, format and group everywhere")
        if gates[0].shape != (F, D):
            raise SoliError(f"a gate of shape {gates[0].shape} does not fit a down projection of shape {(D, F)}")
        addresses = [[_matrix_address(matrix) for matrix in part] for part in (gates, ups, downs)]
        formats = (gates[0].format, gates[0].group), (downs[0].format, downs[0].group)
        return cls(*formats, (len(downs), D, F), torch.tensor(addresses, dtype=torch.int64), (*gates, *ups, *downs))


def experts(
    isa: int,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    table: ExpertTable,
    windows: Iterable[range] | None = None,
) -> Tensor:
    """Equation 12's routed part for T tokens: (T, D), int64 (T, K), (T, K) to (T, D) in the dtype of x.

    A token's experts are summed in ascending order. `windows`: the experts 0 ... E - 1 in consecutive ranges, each of
    which need be in memory only when it is taken; None where all are. IndexError for an id outside 0 ... E - 1.
    """
    E, D, F = table.shape
    _check_tokens(x_TD, D)
    T, K = expert_ids_TK.shape
    if x_TD.shape[0] != T or weights_TK.shape != (T, K) or expert_ids_TK.dtype != torch.int64:
        raise ValueError(f"{x_TD.shape[0]} tokens, expert ids {(T, K)}, weights {tuple(weights_TK.shape)} do not fit")
    x_TD, ids_TK, weights_TK = x_TD.contiguous(), expert_ids_TK.contiguous(), weights_TK.float().contiguous()
    y_TD = torch.empty_like(x_TD)
    sum_TD = None if windows is None else torch.zeros(T, D)
    kernels = require_library()
    in_format, in_group = table.gate_up
    out_format, out_group = table.down
    for window in windows or (range(E),):
        code = kernels.experts(
            isa, FORMATS[in_format], in_group, FORMATS[out_format], out_group,
            E, D, F, table.addresses_3E2.data_ptr(), T, K, DTYPES[x_TD.dtype], x_TD.data_ptr(), ids_TK.data_ptr(),
            weights_TK.data_ptr(), y_TD.data_ptr(), torch.get_num_threads(),
            window.start, window.stop, 0 if sum_TD is None else sum_TD.data_ptr(),
        )  # fmt: skip
        check_error(code, E)
    return y_TD


def latent_decode(
    isa: int, q_BHX: Tensor, blocks_PSX: Tensor, table_BM: Tensor, lengths_B: Tensor, *, latent: int, scale: float
) -> Tensor:
    """Attention of one query per sequence over latents in blocks, as in reference.py; table and lengths int32.

    A row's bits depend on its query and slots alone: neither on the other rows nor on which blocks its slots are in or
    how large these are. IndexError for a row without a slot, or with one outside the blocks.
    """
    B, H, X = q_BHX.shape
    P, S, width = blocks_PSX.shape
    _check_tokens(q_BHX, width)
    indices_fit = table_BM.dtype == lengths_B.dtype == torch.int32 and table_BM.shape[:1] == lengths_B.shape == (B,)
    blocks_fit = blocks_PSX.dtype == q_BHX.dtype and blocks_PSX.is_contiguous() and 0 < latent <= X
    if not indices_fit or not blocks_fit:
        raise ValueError(
            f"queries {q_BHX.dtype} {tuple(q_BHX.shape)}, blocks {blocks_PSX.dtype} {tuple(blocks_PSX.shape)}, table "
            f"{table_BM.dtype} {tuple(table_BM.shape)}, lengths {lengths_B.dtype} {tuple(lengths_B.shape)} do not fit"
        )
    q_BHX, table_BM, lengths_B = q_BHX.contiguous(), table_BM.contiguous(), lengths_B.contiguous()
    y_BHC = q_BHX.new_empty(B, H, latent)
    code = require_library().latent_decode(
        isa, DTYPES[q_BHX.dtype], B, H, X, latent, q_BHX.data_ptr(), blocks_PSX.data_ptr(),
        P, S, table_BM.data_ptr(), table_BM.shape[1], lengths_B.data_ptr(), scale, y_BHC.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    check_error(code)
    return y_BHC


def order_int4(values: Tensor, ordered: Tensor) -> None:
    """Bytes of neighbouring numbers into the order of Soli's int4, as `formats.integer.from_neighbour_pairs`, on one
    thread; both may be the same tensor."""
    fits = values.dtype == ordered.dtype == torch.uint8 and values.numel() == ordered.numel()
    if values.numel() % 16 or not (fits and values.is_contiguous() and ordered.is_contiguous()):
        raise ValueError(f"{values.dtype} {tuple(values.shape)}, {ordered.dtype} {tuple(ordered.shape)} do not fit")
    check_error(require_library().order_int4(values.data_ptr(), ordered.data_ptr(), values.numel() // 16))


def available() -> bool:
    """Whether the C++ kernels can run here; builds them when they are not built yet."""
    return library() is not None


def require_library() -> Library:
    """The compiled kernels; SoliError where they are missing."""
    kernels = library()
    if kernels is None:
        raise SoliError("the C++ kernels are missing on this machine; `soli doctor` says why")
    return kernels


def _check_tokens(x: Tensor, width: int) -> None:
    if x.dtype not in DTYPES or x.device.type != "cpu":
        raise ValueError(f"the C++ kernels take float32 or bfloat16 on a CPU, not {x.dtype} on {x.device}")
    if x.shape[-1] != width:
        raise ValueError(f"tokens of width {x.shape[-1]} do not fit a weight of {width} input features")


def _matrix_address(weight: QuantizedWeight) -> tuple[int, int]:
    """Of its values and of its scale; 0 without a scale."""
    return weight.values.data_ptr(), 0 if weight.scale is None else weight.scale.data_ptr()


@lru_cache(maxsize=4096)
def _plain_table(
    gate_up: int, down: int, in_dtype: torch.dtype, out_dtype: torch.dtype, in_shape: torch.Size, out_shape: torch.Size
) -> ExpertTable:
    """A table from addresses and shapes alone, so nothing in it goes stale; decoding needs it for every token."""
    E, D, F = out_shape
    if in_shape != (E, 2 * F, D):
        raise SoliError(f"gate and up of shape {tuple(in_shape)} do not fit a down projection of shape {(E, D, F)}")
    half = F * D * in_dtype.itemsize  # bytes of one gate, or up
    first_3 = torch.tensor([gate_up, gate_up + half, down])
    stride_3 = torch.tensor([2 * half, 2 * half, D * F * out_dtype.itemsize])
    weights_3E = first_3[:, None] + stride_3[:, None] * torch.arange(E)
    addresses_3E2 = torch.stack((weights_3E, torch.zeros_like(weights_3E)), dim=-1)
    return ExpertTable((FORMAT_NAMES[in_dtype], 0), (FORMAT_NAMES[out_dtype], 0), (E, D, F), addresses_3E2, ())
