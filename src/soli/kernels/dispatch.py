"""Which implementation answers a seam's call: C++ on a CPU when no gradient is wanted, plain torch everywhere else.

SOLI_KERNELS forces one: `reference` (the oracle), `torch`, or `cpu` (an error where the C++ kernels are missing or
cannot take the call's tensors; calls that want a gradient still go to torch). The choice looks at dtypes, devices and
sizes alone, so the same call always gets the same answer.

Shapes: T tokens, D hidden, E experts, F expert width, K chosen; B rows, H heads, P pages of S slots, M pages of a row,
X = C latent + R rotary width.
"""

from __future__ import annotations

import os
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter

from soli.errors import SoliError
from soli.formats.quantized import QuantizedWeight
from soli.kernels import cpu, latent_torch, packed_torch, reference, sorted_experts, torch_linear
from soli.kernels.packed_torch import QuantizedExperts

WAYS = ("reference", "torch", "cpu")
NARROW = (torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8)  # weights that any token may meet

# Measured beside torch 2.13 (benchmarks/cpu_kernels.py): the experts of a layer are faster in C++ at every size, and so
# are float32 products of more than one token. One matrix is faster in torch for many bfloat16 tokens, where oneDNN
# multiplies those. For one float32 token and a small matrix torch takes less time before its product, but its bits
# differ from those in a batch.
ONEDNN_FROM = 48  # bfloat16 tokens


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, in the dtype of x."""
    way = forced()
    if _takes(x, weight, way) and wins(x.dtype, x.shape[:-1].numel()):
        return cpu.plain_linear(x, weight, bias)
    return (reference if way == "reference" else torch_linear).linear(x, weight, bias)


def experts(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Equation 12's routed part for T tokens: (T, D), (T, K), (T, K) to (T, D) in the dtype of x."""
    way = forced()
    if _takes(x_TD, gate_up_E2FD, way) and _takes(weights_TK, down_EDF, way):
        table = cpu.ExpertTable.from_plain(gate_up_E2FD, down_EDF)
        return cpu.experts(x_TD, expert_ids_TK, weights_TK, table)
    answer = reference.experts if way == "reference" else sorted_experts.experts
    return answer(x_TD, expert_ids_TK, weights_TK, gate_up_E2FD, down_EDF)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the quantized weight (out, in) transposed, in the dtype of x."""
    if _takes(x, weight.weight, forced()):
        return cpu.linear(x, weight, bias)
    return packed_torch.linear(x, weight, bias)


def quantized_experts(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, quantized: QuantizedExperts) -> Tensor:
    """Equation 12's routed part from quantized experts, wherever they lie; only those that were chosen are read."""
    if _takes(x_TD, quantized.downs[0].weight, forced()):
        table = table_of(quantized)
        if table is not None:
            return cpu.experts(x_TD, expert_ids_TK, weights_TK, table)
    return packed_torch.experts(x_TD, expert_ids_TK, weights_TK, quantized)


def latent_decode(
    q_BHX: Tensor, pages_PSX: Tensor, table_BM: Tensor, lengths_B: Tensor, *, latent: int, scale: float
) -> Tensor:
    """Attention of one query per row over paged latents (`reference.latent_decode` says which): (B, H, C)."""
    way = forced()
    if _takes(q_BHX, pages_PSX, way) and pages_PSX.dtype == q_BHX.dtype:
        answer = cpu.latent_decode
    else:
        answer = (reference if way == "reference" else latent_torch).latent_decode
    return answer(q_BHX, pages_PSX, table_BM, lengths_B, latent=latent, scale=scale)


def takes(x: Tensor) -> bool:
    """Whether C++ shall compute what follows from x: real activations on a CPU that want no gradient."""
    return _takes(x, x, forced())


def wins(dtype: torch.dtype, rows: int, quantized: bool = False) -> bool:
    """Whether C++ is the faster way for one matrix and so many rows, or is the way that is asked for."""
    fewer = rows < ONEDNN_FROM
    return quantized or fewer or dtype != torch.bfloat16 or not torch_linear.narrow_products() or forced() == "cpu"


def table_of(quantized: QuantizedExperts) -> cpu.ExpertTable | None:
    """Where a layer's quantized experts lie, found once; None for experts of different formats, which are torch's."""
    if quantized not in _tables:
        parts = quantized.gates + quantized.ups, quantized.downs
        kinds = [{(w.format, w.group, w.shape) for w in part} for part in parts]
        uniform = all(len(kind) == 1 for kind in kinds)
        stacks = quantized.gates, quantized.ups, quantized.downs
        _tables[quantized] = cpu.ExpertTable.from_matrices(*stacks) if uniform else None
    return _tables[quantized]


def forced() -> str | None:
    """What SOLI_KERNELS asks for; None without it. SoliError for a way that does not exist."""
    way = os.environ.get("SOLI_KERNELS") or None
    if way is not None and way not in WAYS:
        raise SoliError(f"SOLI_KERNELS is {way!r}: choose one of {', '.join(WAYS)}, or leave it unset")
    return way


def _takes(x: Tensor, weight: Tensor, way: str | None) -> bool:
    """Whether the C++ kernels shall answer: real CPU tensors that they read, and nobody wants a gradient."""
    if way in ("reference", "torch") or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return False
    # Exact types: a tensor of a tracing or sharding subclass has no memory to read. A plain weight may be narrower than
    # its tokens but not wider: torch rounds a float32 master before its product.
    fits = (
        type(x) is Tensor
        and type(weight) in (Tensor, Parameter)
        and x.dtype in cpu.DTYPES
        and weight.dtype in (x.dtype, *NARROW)
        and x.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
    )
    return fits and (cpu.available() or way == "cpu")


_tables: WeakKeyDictionary[QuantizedExperts, cpu.ExpertTable | None] = WeakKeyDictionary()
