"""Weights of random values for the tests of the C++ kernels, the instruction sets to test, and their bounds."""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from soli.formats.quantized import CODECS, QuantizedWeight, plain
from soli.kernels import cpu
from soli.kernels.cpu.native import available_isas, library

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")

#: |y - exact| <= BOUND[dtype of the tokens] * sum |x| |w|, for every format: values and scales are exact, so
#: what is left is float32 sums, and for bfloat16 tokens the one rounding of the result (2^-8 of it). `exact` is of
#: tokens `as_multiplied`.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8 + 1e-5}
DTYPES = tuple(BOUND)
SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # one instruction set for all examples
INTEGERS = ("int8", "int4", "int4_bf16")
FORMATS = ("fp32", "bf16", "fp8", "fp8_row", "fp4", *INTEGERS)


@cache
def isas() -> tuple[str, ...]:
    kernels = library()
    return available_isas(kernels.best_isa) if kernels else ()


def rounds_tokens(isa: str, format: str, dtype: torch.dtype) -> bool:
    """Whether tokens are multiplied in 8 bits."""
    return isa != "portable" and format in INTEGERS and dtype == torch.bfloat16


def as_multiplied(x: Tensor, isa: str, format: str) -> Tensor:
    """Tokens (..., I) as the kernel multiplies them: where `rounds_tokens`, in 8 bits, -127 ... 127 times max / 127 for
    each 128 numbers; else unchanged."""
    if not rounds_tokens(isa, format, x.dtype):
        return x
    parts = []
    for part in x.float().split(128, dim=-1):
        largest = part.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
        parts.append((part * (127 / largest)).round() * (largest / 127))
    return torch.cat(parts, -1)


def groups(format: str) -> tuple[int, ...]:
    """The numbers of inputs that can share a scale, where a format has several."""
    return CODECS[format].groups if len(CODECS[format].groups) > 1 else (0,)


def fitting_group(format: str, group: int) -> int:
    """`group`, or for FP4, which has no group above 32, a quarter of it."""
    return group if group in groups(format) or format != "fp4" else group // 4


def inputs(format: str, width: int, group: int) -> int:
    """`width` input features, or the next number that the format allows."""
    group = fitting_group(format, group)
    return -(-width // group) * group if group in groups(format) and group else width


def random_weight(format: str, shape: tuple[int, ...], group: int, generator: torch.Generator) -> QuantizedWeight:
    """Any values that the format has, with scales of 0.5 to 1.5 times what makes the weight's variance 1."""
    if format in ("fp32", "bf16"):
        return plain(torch.randn(shape, generator=generator).to(torch.float32 if format == "fp32" else torch.bfloat16))
    *leading, O, I = shape  # noqa: E741
    group = fitting_group(format, group)
    if format in ("fp8", "fp8_row"):
        values = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        values[values & 127 == 127] = 0  # the two NaN
        codec = CODECS[format]
        scale = _scales(codec.scale_shape(shape, 128), 1 / 64, generator)
        return QuantizedWeight(format, values.view(torch.float8_e4m3fn), scale, shape, codec.groups[0])
    scale = _scales((*leading, O, I // group), 1 / (73 if format == "int8" else 4.6), generator)
    scale = scale.to(CODECS[format].scale_dtype)
    if format == "int8":
        values = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    else:
        values = torch.randint(0, 256, (*leading, O, I // 2), generator=generator).to(torch.uint8)
    return QuantizedWeight(format, values, scale, shape, group)


def expert_table(gate_up: QuantizedWeight, down: QuantizedWeight) -> cpu.ExpertTable:
    """Of stacked weights: gate_up (E, 2F, D), gate rows first, and down (E, D, F)."""
    experts = range(len(down.values))
    gates, ups = ([_half(gate_up[e], number) for e in experts] for number in (0, 1))
    return cpu.ExpertTable.from_matrices(gates, ups, [down[e] for e in experts])


def _half(weight: QuantizedWeight, number: int) -> QuantizedWeight:
    """The first or second half of a matrix's rows, without a copy."""
    values = weight.values.chunk(2)[number]
    scale = None if weight.scale is None else weight.scale.chunk(2)[number]
    return QuantizedWeight(weight.format, values, scale, (len(values), weight.shape[1]), weight.group)


def _scales(shape: tuple[int, ...], size: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) + 0.5) * size
