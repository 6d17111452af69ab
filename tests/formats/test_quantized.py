"""QuantizedWeight against its definition, written out number by number, and what it refuses."""

from collections.abc import Callable
from math import ceil

import pytest
import torch
from torch import Tensor

from soli.errors import SoliError
from soli.formats import fp8
from soli.formats.quantized import QuantizedWeight, plain


def ints(*shape: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)).half()


@pytest.mark.parametrize("group", [32, 64])
def test_int8_is_code_times_scale(group: int) -> None:
    codes = ints(2, 3, 128, low=-127, high=128, dtype=torch.int8)
    weight = QuantizedWeight("int8", codes, scales(2, 3, 128 // group), (2, 3, 128), group)
    for e, o, i in ((0, 0, 0), (1, 2, 127), (1, 0, 63), (0, 1, 64)):
        wanted = float(weight.weight[e, o, i]) * float(weight.scale[e, o, i // group])
        assert float(weight.dequantize(torch.float32)[e, o, i]) == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(weight[1].dequantize(), weight.dequantize()[1])


def test_int4_keeps_numbers_16_apart_in_one_byte() -> None:
    codes, scale = ints(3, 32, low=0, high=256, dtype=torch.uint8), scales(3, 2)
    written = QuantizedWeight("int4", codes, scale, (3, 64), 32).dequantize(torch.float32)
    for o in range(3):
        for i in range(64):
            run, j = divmod(i, 32)
            byte = int(codes[o, run * 16 + j % 16])
            nibble = byte >> 4 if j >= 16 else byte & 15
            assert float(written[o, i]) == (nibble - 8) * float(scale[o, run])


def test_fp8_is_what_the_format_says() -> None:
    packed = fp8.pack(torch.randn(200, 150, generator=torch.Generator().manual_seed(0)))
    weight = QuantizedWeight("fp8", packed.codes_OI, packed.scale_PQ, (200, 150), 128)
    assert torch.equal(weight.dequantize(), fp8.unpack(packed))
    assert weight.nbytes == 200 * 150 + 4 * ceil(200 / 128) * ceil(150 / 128)


def test_plain_weights_are_taken_as_they_are() -> None:
    weight = torch.randn(4, 6)
    assert plain(weight).weight is weight and plain(weight.bfloat16()).format == "bf16"


@pytest.mark.parametrize(
    ("made", "said"),
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
def test_what_does_not_fit_is_refused(made: Callable[[], QuantizedWeight], said: str) -> None:
    with pytest.raises(SoliError, match=said):
        made()
