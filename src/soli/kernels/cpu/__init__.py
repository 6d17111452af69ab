"""The seams in C++: weights of every format multiplied as they lie, and attention over paged latents, for inference.

Numerics: activations are float32 or bfloat16 and results have their dtype; every dot product is summed in float32, in
an order that depends on its length alone, so a token's result has the same bits alone and in any batch, with any number
of threads. bfloat16 tokens meet bfloat16 products where the processor has them (AVX-512 BF16), and beside int8 and int4
weights products of bytes, tokens rounded to 8 bits (AVX2 and later); elsewhere float32 ones.
No gradient is recorded. `isa`: the instruction set by its number in `native.ISAS`.

Shapes: T tokens, D hidden, E experts, F expert width, K chosen, O output and I input features; B rows, H heads, P pages
of S slots, M pages of a row, X = C latent + R rotary width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from soli.errors import SoliError
from soli.formats.quantized import QuantizedWeight
from soli.kernels.cpu.native import DTYPES, FORMATS, Library, check_error, library

FORMAT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # of plain tensors
PLAIN = {dtype: FORMATS[name] for dtype, name in FORMAT_NAMES.items()}


def linear(isa: int, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., I), float32 or bfloat16, times weight (O, I) transposed: (..., O) in the dtype of x."""
    scale = None if weight.scale is None else weight.scale.data_ptr()
    return _linear(isa, x, FORMATS[weight.format], weight.shape, weight.group, weight.values.data_ptr(), scale, bias)


def plain_linear(isa: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same for a contiguous float32 or bfloat16 matrix, with little before the call: small products are many."""
    return _linear(isa, x, PLAIN[weight.dtype], weight.shape, 0, weight.data_ptr(), None, bias)


def _linear(
    isa: int,
    x: Tensor,
    format: int,
    shape: Sequence[int],
    group: int,
    weight: int,
    scale: int | None,
    bias: Tensor | None,
) -> Tensor:
    O, I = shape  # noqa: E741
    _check_tokens(x, I)
    if not x.is_contiguous():
        x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], O))
    kernels = loaded()
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
    references to their memory. Gate and up share format and group; down may have its own.
    """

    gate_up: tuple[str, int]  # format, group
    down: tuple[str, int]
    shape: tuple[int, int, int]  # E, D, F
    addresses_3E2: Tensor
    keep_alive: tuple[object, ...]

    @classmethod
    def from_stacked(cls, gate_up: QuantizedWeight, down: QuantizedWeight) -> ExpertTable:
        """Of stacked weights: gate_up (E, 2F, D), gate rows first, and down (E, D, F)."""
        E, D, F = down.shape
        if gate_up.shape != (E, 2 * F, D):
            raise SoliError(f"gate and up of shape {gate_up.shape} do not fit a down projection of shape {down.shape}")
        if gate_up.format == "fp8" and F % gate_up.group:
            raise SoliError(f"stacked FP8 gate and up need a width that is a multiple of {gate_up.group}, not {F}")
        spans = _spans(gate_up), _spans(down)
        bases = [(w.values.data_ptr(), 0 if w.scale is None else w.scale.data_ptr()) for w in (gate_up, down)]
        addresses = _addresses(bases, spans, E)
        return cls((gate_up.format, gate_up.group), (down.format, down.group), (E, D, F), addresses, (gate_up, down))

    @classmethod
    def from_plain(cls, gate_up_E2FD: Tensor, down_EDF: Tensor) -> ExpertTable:
        """Of stacked float32 or bfloat16 tensors, which the caller keeps alive."""
        if gate_up_E2FD.is_contiguous() and down_EDF.is_contiguous():
            dtypes, shapes = (gate_up_E2FD.dtype, down_EDF.dtype), (gate_up_E2FD.shape, down_EDF.shape)
            return _plain_table(gate_up_E2FD.data_ptr(), down_EDF.data_ptr(), *dtypes, *shapes)
        raise SoliError("stacked experts must be contiguous")

    @classmethod
    def from_matrices(
        cls, gates: Sequence[QuantizedWeight], ups: Sequence[QuantizedWeight], downs: Sequence[QuantizedWeight]
    ) -> ExpertTable:
        """Of matrices that lie apart, as in a file's pages: one gate, up and down for each expert."""
        D, F = downs[0].shape
        kinds = [{(w.format, w.group, w.shape) for w in part} for part in ((*gates, *ups), downs)]
        if len(gates) != len(downs) or len(ups) != len(downs) or any(len(kind) != 1 for kind in kinds):
            raise SoliError("the experts of a layer must have the same number, shape, format and group everywhere")
        if gates[0].shape != (F, D):
            raise SoliError(f"a gate of shape {gates[0].shape} does not fit a down projection of shape {(D, F)}")
        rows = [
            [(w.values.data_ptr(), 0 if w.scale is None else w.scale.data_ptr()) for w in part]
            for part in (gates, ups, downs)
        ]
        formats = (gates[0].format, gates[0].group), (downs[0].format, downs[0].group)
        return cls(*formats, (len(downs), D, F), torch.tensor(rows, dtype=torch.int64), (*gates, *ups, *downs))


def experts(isa: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, table: ExpertTable) -> Tensor:
    """Equation 12's routed part for T tokens: (T, D), int64 (T, K), (T, K) to (T, D) in the dtype of x.

    A token's experts are summed in ascending order. IndexError for an id that is no expert's.
    """
    E, D, F = table.shape
    _check_tokens(x_TD, D)
    T, K = expert_ids_TK.shape
    if x_TD.shape[0] != T or weights_TK.shape != (T, K) or expert_ids_TK.dtype != torch.int64:
        raise ValueError(f"{x_TD.shape[0]} tokens, choices {(T, K)}, weights {tuple(weights_TK.shape)} do not fit")
    x_TD, ids_TK, weights_TK = x_TD.contiguous(), expert_ids_TK.contiguous(), weights_TK.float().contiguous()
    y_TD = torch.empty_like(x_TD)
    kernels = loaded()
    (in_format, in_group), (out_format, out_group) = table.gate_up, table.down
    code = kernels.experts(
        isa, FORMATS[in_format], in_group, FORMATS[out_format], out_group,
        E, D, F, table.addresses_3E2.data_ptr(), T, K, DTYPES[x_TD.dtype], x_TD.data_ptr(), ids_TK.data_ptr(),
        weights_TK.data_ptr(), y_TD.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check_error(code, E)
    return y_TD


def latent_decode(
    isa: int, q_BHX: Tensor, pages_PSX: Tensor, table_BM: Tensor, lengths_B: Tensor, *, latent: int, scale: float
) -> Tensor:
    """Attention of one query per row over paged latents, as `reference.latent_decode`; table and lengths are int32.

    A row's bits depend on its query and slots alone: neither on the other rows nor on where its pages lie or how large
    they are. IndexError for a row without a slot, or with one that lies in no page.
    """
    (B, H, X), (P, S, width) = q_BHX.shape, pages_PSX.shape
    _check_tokens(q_BHX, width)
    fits = table_BM.dtype == lengths_B.dtype == torch.int32 and table_BM.shape[:1] == lengths_B.shape == (B,)
    if not fits or pages_PSX.dtype != q_BHX.dtype or not pages_PSX.is_contiguous() or not 0 < latent <= X:
        raise ValueError(
            f"queries {q_BHX.dtype} {tuple(q_BHX.shape)}, pages {pages_PSX.dtype} {tuple(pages_PSX.shape)}, table "
            f"{table_BM.dtype} {tuple(table_BM.shape)}, lengths {lengths_B.dtype} {tuple(lengths_B.shape)} do not fit"
        )
    q_BHX, table_BM, lengths_B = q_BHX.contiguous(), table_BM.contiguous(), lengths_B.contiguous()
    y_BHC = q_BHX.new_empty(B, H, latent)
    kernels = loaded()
    code = kernels.latent_decode(
        isa, DTYPES[q_BHX.dtype], B, H, X, latent, q_BHX.data_ptr(), pages_PSX.data_ptr(),
        P, S, table_BM.data_ptr(), table_BM.shape[1], lengths_B.data_ptr(), scale, y_BHC.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    check_error(code)
    return y_BHC


def available() -> bool:
    """Whether the C++ kernels can run here; builds them when they are not built yet."""
    return library() is not None


def loaded() -> Library:
    """The compiled kernels; SoliError where they are missing."""
    found = library()
    if found is None:
        raise SoliError("the C++ kernels are missing on this machine; `soli doctor` says why")
    return found


def _check_tokens(x: Tensor, width: int) -> None:
    if x.dtype not in DTYPES or x.device.type != "cpu":
        raise ValueError(f"the C++ kernels take float32 or bfloat16 on a CPU, not {x.dtype} on {x.device}")
    if x.shape[-1] != width:
        raise ValueError(f"tokens of width {x.shape[-1]} do not fit a weight of {width} input features")


def _spans(stack: QuantizedWeight) -> tuple[int, int]:
    """Bytes of one matrix's weight and of its scale in a stack."""
    count = max(1, stack.shape[0])
    return stack.values.nbytes // count, 0 if stack.scale is None else stack.scale.nbytes // count


def _addresses(bases: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], E: int) -> Tensor:
    """(3, E, 2) from where both stacks begin and how far apart their matrices lie; up is gate's second half."""
    (gate_up, down), (gate_up_span, down_span) = bases, spans
    half = tuple(span // 2 for span in gate_up_span)
    starts = torch.tensor([gate_up, [b + h for b, h in zip(gate_up, half, strict=True)], down])
    return starts[:, None] + torch.tensor([gate_up_span, gate_up_span, down_span])[:, None] * torch.arange(E)[:, None]


@lru_cache(maxsize=4096)
def _plain_table(
    gate_up: int, down: int, in_dtype: torch.dtype, out_dtype: torch.dtype, in_shape: torch.Size, out_shape: torch.Size
) -> ExpertTable:
    """A table from addresses and shapes alone, so nothing in it goes stale; decoding asks for it at every token."""
    E, D, F = out_shape
    if in_shape != (E, 2 * F, D):
        raise SoliError(f"gate and up of shape {tuple(in_shape)} do not fit a down projection of shape {(E, D, F)}")
    spans = (2 * F * D * in_dtype.itemsize, 0), (D * F * out_dtype.itemsize, 0)
    formats = (FORMAT_NAMES[in_dtype], 0), (FORMAT_NAMES[out_dtype], 0)
    return ExpertTable(*formats, (E, D, F), _addresses([(gate_up, 0), (down, 0)], spans, E), ())
