"""Triton kernels of FP8 training: quantizing in one pass, and the products of all experts in one launch.

    quantize      tiles or blocks of a matrix, or of its transpose, optionally from FP8 tiles
    grouped       y = a b[e]^T, row tile by row tile, each tile of 128 rows with its own expert e
    by_expert     y[e] = a b^T over the tiles of expert e: gradients of the experts' weights

Sums run in fp32, and each 128 of K are promoted to it before the next, as in the paper (section 3.3.2). Operands are
those of cuda.py, sides multiples of 128. Imported only where Triton is: the interpreter in tests/kernels runs these
very functions on a CPU.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Kind = Literal["rows", "columns", "blocks"]
KINDS: dict[str, int] = {"rows": 0, "columns": 1, "blocks": 2}
SIDE = 128


def quantize(x: Tensor, kind: Kind, transposed: bool, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values and scales of a contiguous matrix (T, I), or of a stack of them for blocks, as an `Operand` holds them, to
    the bit those of plain torch. `scale` (I/128, T) comes with an x that is in FP8 tiles already."""
    *stack, T, I = x.shape  # noqa: E741
    p, q = triton.cdiv(T, SIDE), triton.cdiv(I, SIDE)
    outer, inner = (q, p) if transposed else (p, q)
    values = x.new_empty((*stack, outer * SIDE, inner * SIDE), dtype=torch.float8_e4m3fn)
    if kind == "blocks":
        scales = x.new_zeros((*stack, outer, triton.cdiv(inner, 4) * 4), dtype=torch.float32)
    else:
        scales = x.new_empty((inner, outer * SIDE), dtype=torch.float32)
    row = scales.shape[-1]
    steps = (1, row) if transposed else (row, 1)  # between blocks along T, along I
    grid = (p, q, stack[0] if stack else 1)
    _quantize[grid](x, scale, values, scales, T, I, *steps, KINDS[kind], transposed, scale is not None, num_warps=8)
    return values, scales


def grouped(
    a_UK: Tensor, a_scale_QU: Tensor, b_ENK: Tensor, b_scale_EPQ: Tensor, expert_tile: Tensor, dtype: torch.dtype
) -> Tensor:
    """(U, K) and (E, N, K) to (U, N): rows of tile t times weight expert_tile[t] (int32); zeros where that is -1."""
    U, K = a_UK.shape
    N = b_ENK.shape[1]
    y_UN = a_UK.new_empty((U, N), dtype=dtype)
    grid = (N // SIDE, U // SIDE)
    _grouped[grid](
        a_UK, a_scale_QU, b_ENK, b_scale_EPQ, y_UN, expert_tile, U, N, K, b_scale_EPQ.shape[-1],
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return y_UN


def by_expert(
    a_MU: Tensor, a_scale_QM: Tensor, b_NU: Tensor, b_scale_QN: Tensor, first_tile: Tensor, dtype: torch.dtype
) -> Tensor:
    """(M, U) and (N, U) to (E, M, N): expert e sums over tiles first_tile[e] to first_tile[e + 1] (int32, E + 1)."""
    (M, U), N, E = a_MU.shape, b_NU.shape[0], first_tile.shape[0] - 1
    y_EMN = a_MU.new_empty((E, M, N), dtype=dtype)
    grid = (N // SIDE, M // SIDE, E)
    _by_expert[grid](a_MU, a_scale_QM, b_NU, b_scale_QN, y_EMN, first_tile, U, M, N, num_warps=8, num_stages=3)
    return y_EMN


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x, x_scale, values, scale, T, I, step_p, step_q,  # noqa: E741
    KIND: tl.constexpr, TRANSPOSED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    q = tl.program_id(1)
    s = tl.program_id(2).to(tl.int64)
    t = p * 128 + tl.arange(0, 128)
    i = q * 128 + tl.arange(0, 128)
    padded_T = tl.cdiv(T, 128) * 128
    padded_I = tl.cdiv(I, 128) * 128
    inside = (t[:, None] < T) & (i[None, :] < I)
    tile = tl.load(x + s * T * I + t[:, None].to(tl.int64) * I + i[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        tile = tile * tl.load(x_scale + q * padded_T + t)[:, None]
    if KIND == 0:
        amax = tl.max(tl.abs(tile), axis=1)
    elif KIND == 1:
        amax = tl.max(tl.abs(tile), axis=0)
    else:
        amax = tl.max(tl.max(tl.abs(tile), axis=1), axis=0)
    # formats.fp8: amax / 448, not below the smallest normal number, and 1 for zeros
    step = tl.where(amax == 0.0, 1.0, tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38))
    if KIND == 0:
        tl.store(scale + q * padded_T + t, step)
        tile = tl.div_rn(tile, step[:, None])
    elif KIND == 1:
        tl.store(scale + p * padded_I + i, step)
        tile = tl.div_rn(tile, step[None, :])
    else:
        per_matrix = tl.cdiv(T, 128) * step_p if not TRANSPOSED else tl.cdiv(I, 128) * step_q
        tl.store(scale + s * per_matrix + p * step_p + q * step_q, step)
        tile = tl.div_rn(tile, step)
    quantized = tile.to(values.dtype.element_ty)
    at = values + s * padded_T * padded_I
    if TRANSPOSED:
        tl.store(at + i[:, None].to(tl.int64) * padded_T + t[None, :], tl.trans(quantized))
    else:
        tl.store(at + t[:, None].to(tl.int64) * padded_I + i[None, :], quantized)


@triton.jit
def _grouped(a, a_scale, b, b_scale, y, expert_tile, U, N, K, scale_row):  # type: ignore[no-untyped-def]
    n = tl.program_id(0)
    m = tl.program_id(1)
    e = tl.load(expert_tile + m).to(tl.int64)
    rows = m.to(tl.int64) * 128 + tl.arange(0, 128)
    columns = (n * 128 + tl.arange(0, 128)).to(tl.int64)
    inner = tl.arange(0, 128)
    total = tl.zeros((128, 128), dtype=tl.float32)
    for k in range(0, tl.where(e < 0, 0, K // 128)):
        a_tile = tl.load(a + rows[:, None] * K + k * 128 + inner[None, :])
        b_tile = tl.load(b + e * N * K + columns[None, :] * K + k * 128 + inner[:, None])
        step = tl.load(a_scale + k * U + rows) * tl.load(b_scale + (e * (N // 128) + n) * scale_row + k)
        total += tl.dot(a_tile, b_tile) * step[:, None]
    tl.store(y + rows[:, None] * N + columns[None, :], total.to(y.dtype.element_ty))


@triton.jit
def _by_expert(a, a_scale, b, b_scale, y, first_tile, U, M, N):  # type: ignore[no-untyped-def]
    n = tl.program_id(0)
    m = tl.program_id(1)
    e = tl.program_id(2)
    rows = (m * 128 + tl.arange(0, 128)).to(tl.int64)
    columns = (n * 128 + tl.arange(0, 128)).to(tl.int64)
    inner = tl.arange(0, 128)
    total = tl.zeros((128, 128), dtype=tl.float32)
    for k in range(tl.load(first_tile + e), tl.load(first_tile + e + 1)):
        a_tile = tl.load(a + rows[:, None] * U + k * 128 + inner[None, :])
        b_tile = tl.load(b + columns[None, :] * U + k * 128 + inner[:, None])
        a_step = tl.load(a_scale + k * M + rows)
        b_step = tl.load(b_scale + k * N + columns)
        total += tl.dot(a_tile, b_tile) * a_step[:, None] * b_step[None, :]
    at = y + e.to(tl.int64) * M * N + rows[:, None] * N + columns[None, :]
    tl.store(at, total.to(y.dtype.element_ty))
