"""QuantizedWeight against its definition, number by number, and what it rejects."""

from collections.abc import Callable
from math import ceil

import pytest
import torch
from torch import Tensor

from soli.errors import SoliError
from soli.formats.quantized import BF16, FP8, QuantizedWeight, plain


def ints(*shape: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)).half()


@pytest.mark.parametrize("group", [32, 64])
def test_int8_is_value_times_scale(group: int) -> None:
    values = ints(2, 3, 128, low=-127, high=128, dtype=torch.int8)
    weight = QuantizedWeight("int8", values, scales(2, 3, 128 // group), (2, 3, 128), group)
    for e, o, i in ((0, 0, 0), (1, 2, 127), (1, 0, 63), (0, 1, 64)):
        exact = float(weight.values[e, o, i]) * float(weight.scale[e, o, i // group])
        assert float(weight.dequantize(torch.float32)[e, o, i]) == pytest.approx(exact, rel=1e-6)
    assert torch.equal(weight[1].dequantize(), weight.dequantize()[1])


def test_int4_keeps_numbers_16_apart_in_one_byte() -> None:
    values, scale = ints(3, 32, low=0, high=256, dtype=torch.uint8), scales(3, 2)
    dequantized = QuantizedWeight("int4", values, scale, (3, 64), 32).dequantize(torch.float32)
    for o in range(3):
        for i in range(64):
            run, j = divmod(i, 32)
            byte = int(values[o, run * 16 + j % 16])
            nibble = byte >> 4 if j >= 16 else byte & 15
            assert float(dequantized[o, i]) == (nibble - 8) * float(scale[o, run])


def test_fp8_is_value_times_the_scale_of_its_block() -> None:
    weight = FP8.quantize(torch.randn(200, 150, generator=torch.Generator().manual_seed(0)))
    scale = weight.scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :150]
    assert torch.equal(weight.dequantize(), (weight.values.float() * scale).bfloat16())
    stack = QuantizedWeight("fp8", weight.values[None], weight.scale[None], (1, 200, 150), 128)
    assert torch.equal(stack.dequantize()[0], weight.dequantize())
    assert weight.nbytes == 200 * 150 + 4 * ceil(200 / 128) * ceil(150 / 128)


def test_plain_weights_are_not_copied() -> None:
    weight = torch.randn(4, 6)
    assert plain(weight).values is weight and plain(weight.bfloat16()).format == "bf16"


def test_plain_formats_are_casts() -> None:
    weight = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(BF16.quantize(weight).dequantize(torch.float32), weight.bfloat16().float())


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: QuantizedWeight("int3", torch.zeros(4, 32), None, (4, 32), 32), "int3"),
        (lambda: QuantizedWeight("int8", torch.zeros(4, 32, dtype=torch.int8), None, (4, 32), 32), "needs its scale"),
        (
            lambda: QuantizedWeight("int8", torch.zeros(4, 48, dtype=torch.int8), scales(4, 1), (4, 48), 32),
            "no multiple",
        ),
        (lambda: QuantizedWeight("int8", torch.zeros(4, 32), scales(4, 1), (4, 32), 32), "must be torch.int8"),
        (
            lambda: QuantizedWeight("int4", torch.zeros(4, 32, dtype=torch.uint8), scales(4, 1), (4, 32), 32),
            r"\(4, 16\)",
        ),
        (lambda: QuantizedWeight("bf16", torch.zeros(6, 4).bfloat16().T, None, (4, 6), 0), "not contiguous"),
        (lambda: QuantizedWeight("bf16", torch.zeros(6).bfloat16(), None, (6,), 0), "matrix"),
        (lambda: QuantizedWeight("fp32", torch.zeros(4, 6), scales(4, 1), (4, 6), 0), "has no scale"),
        (
            lambda: QuantizedWeight("int4", torch.zeros(4, 16, dtype=torch.uint8), scales(4, 2), (4, 32), 16),
            "groups of",
        ),
        (lambda: plain(torch.zeros(4, 6, dtype=torch.float64)), "float64"),
    ],
)
def test_tensors_that_do_not_fit_are_rejected(construct: Callable[[], QuantizedWeight], message: str) -> None:
    with pytest.raises(SoliError, match=message):
        construct()
