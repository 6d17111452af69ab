"""The C++ linear seam against float64, on every instruction set that this machine has."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soli.errors import SoliError
from soli.formats.quantized import QuantizedWeight
from soli.kernels import cpu
from soli.kernels.cpu.native import DTYPES, FORMATS, ISAS, isa_number, library
from tests.kernels import weights
from tests.kernels.weights import BOUND, needs_kernels, random_weight

pytestmark = needs_kernels


@pytest.fixture(params=weights.isas())
def isa(request):
    return request.param


def linear(isa: str, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return cpu.linear(ISAS.index(isa), x, weight, bias)


def into_poison(isa: str, x_TI: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """cpu.linear into memory full of NaN; what is around the result must stay as it was."""
    (T, I), O = x_TI.shape, weight.shape[0]  # noqa: E741
    kernels, margin = library(), 64
    space = torch.full((T * O + 2 * margin,), float("nan"), dtype=x_TI.dtype)
    code = kernels.linear(
        ISAS.index(isa), FORMATS[weight.format], O, I, weight.group, weight.values.data_ptr(),
        0 if weight.scale is None else weight.scale.data_ptr(), T, DTYPES[x_TI.dtype], x_TI.data_ptr(),
        space[margin:].data_ptr(), 1,
    )  # fmt: skip
    assert code == 0 and space[:margin].isnan().all() and space[-margin:].isnan().all()
    return space[margin:-margin].view(T, O)


@pytest.mark.parametrize("format", weights.FORMATS)
@settings(weights.SETTINGS, max_examples=12)
@given(
    T=st.integers(1, 19), O=st.integers(1, 41), I=st.integers(1, 400), group=st.sampled_from((32, 64, 128)),
    half=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_is_the_product_within_the_bound(isa, format, T, O, I, group, half, seed) -> None:  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(format, (O, weights.inputs(format, I, group)), group, generator)
    x_TI = torch.randn(T, weight.shape[1], generator=generator).to(torch.bfloat16 if half else torch.float32)
    y_TO = into_poison(isa, x_TI, weight)
    exact_OI, exact_TI = weight.dequantize(torch.float64), weights.as_multiplied(x_TI, isa, format).double()
    limit_TO = BOUND[x_TI.dtype] * (exact_TI.abs() @ exact_OI.abs().T)
    assert ((y_TO.double() - exact_TI @ exact_OI.T).abs() <= limit_TO).all()
    alone = torch.cat([linear(isa, x_TI[t : t + 1], weight) for t in range(T)])
    assert torch.equal(alone, y_TO)


@pytest.mark.parametrize("format", weights.FORMATS)
def test_many_tokens_have_the_bits_of_each_alone(isa, format) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = random_weight(format, (70, 384), 32, generator)
    for dtype in weights.DTYPES:
        x_TI = torch.randn(150, 384, generator=generator).to(dtype)
        y_TO = into_poison(isa, x_TI, weight)
        for t in (0, 77, 127, 128, 149):
            assert torch.equal(linear(isa, x_TI[t], weight), y_TO[t])


@pytest.mark.parametrize("dtype", weights.DTYPES)
@pytest.mark.parametrize("group", (32, 128))
def test_bf16_scales_may_be_beyond_float16(isa, dtype, group) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = random_weight("int4_bf16", (20, 384), group, generator)
    weight.scale[:7] *= 2.0**-40
    weight.scale[7:11] *= 2.0**30
    x_TI = torch.randn(40, 384, generator=generator).to(dtype)
    exact_TI = weights.as_multiplied(x_TI, isa, "int4_bf16").double()
    exact_OI = weight.dequantize(torch.float64)
    limit_TO = BOUND[dtype] * (exact_TI.abs() @ exact_OI.abs().T)
    for tokens in (x_TI, x_TI[:2]):
        y_TO = linear(isa, tokens.contiguous(), weight).double()
        assert ((y_TO - exact_TI[: len(tokens)] @ exact_OI.T).abs() <= limit_TO[: len(tokens)]).all()


@pytest.mark.parametrize("format", weights.INTEGERS)
def test_8_bit_tokens_of_any_magnitude_and_with_nan_or_infinity(isa, format) -> None:
    generator = torch.Generator().manual_seed(8)
    weight = random_weight(format, (20, 256), 128, generator)
    x_TI = torch.randn(5, 256, generator=generator) * torch.tensor([1e-30, 1e-36, 1.0, 1e30, 0.0])[:, None]
    x_TI = x_TI.bfloat16()
    exact_TI, exact_OI = weights.as_multiplied(x_TI, isa, format).double(), weight.dequantize(torch.float64)
    limit_TO = BOUND[torch.bfloat16] * (exact_TI.abs() @ exact_OI.abs().T) + 1e-30
    assert ((linear(isa, x_TI, weight).double() - exact_TI @ exact_OI.T).abs() <= limit_TO).all()
    for wrong in (float("nan"), float("inf")):
        x_TI[2, 200] = wrong
        y_TO = linear(isa, x_TI, weight)
        assert not y_TO[2].isfinite().any() and y_TO[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("format", weights.INTEGERS)
@pytest.mark.parametrize("group", (32, 64, 128))
def test_any_number_of_tokens_has_the_bits_of_each_alone(isa, format, group) -> None:
    generator = torch.Generator().manual_seed(9)
    weight = random_weight(format, (37, 640 - group), group, generator)
    x_TI = torch.randn(41, 640 - group, generator=generator).bfloat16()
    alone = torch.cat([linear(isa, x_TI[t : t + 1], weight) for t in range(41)])
    for T in range(1, 42):
        assert torch.equal(into_poison(isa, x_TI[:T].contiguous(), weight), alone[:T])


@pytest.mark.parametrize("format", weights.INTEGERS)
@pytest.mark.parametrize("group", (32, 64, 128))
def test_8_bit_products_have_the_same_bits_on_every_instruction_set(format, group) -> None:
    sets = [isa for isa in weights.isas() if weights.rounds_tokens(isa, format, torch.bfloat16)]
    if len(sets) < 2:
        pytest.skip(f"this processor has {len(sets)} instruction set that has 8-bit products, not two")
    generator = torch.Generator().manual_seed(11)
    weight = random_weight(format, (37, 640), group, generator)
    x_TI = torch.randn(41, 640, generator=generator).bfloat16()
    many_tokens = [linear(isa, x_TI, weight) for isa in sets]
    few_tokens = [linear(isa, x_TI[:2].contiguous(), weight) for isa in sets]
    assert all(torch.equal(y_TO, many_tokens[0]) for y_TO in many_tokens)
    assert all(torch.equal(y_TO, few_tokens[0]) for y_TO in few_tokens)


def test_threads_do_not_change_a_bit(isa) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, x = random_weight("int4", (200, 128), 64, generator), torch.randn(5, 128, generator=generator).bfloat16()
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(linear(isa, x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_every_fp8_value_is_decoded_as_torch_decodes_it(isa) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].contiguous()
    weight = QuantizedWeight("fp8", values, torch.ones(2, 1), (256, 1), 128)
    for dtype in weights.DTYPES:
        np.testing.assert_array_equal(linear(isa, torch.ones(1, dtype=dtype), weight).float(), values.float()[:, 0])


@pytest.mark.parametrize("group", (16, 32))
def test_every_fp4_value_is_decoded_in_every_place(isa, group) -> None:
    generator = torch.Generator().manual_seed(12)
    values = torch.randint(0, 256, (90, 80), generator=generator).to(torch.uint8)
    scale = 2.0 ** torch.arange(-4, 160 // group - 4).repeat(90, 1)
    weight = QuantizedWeight("fp4", values, scale, (90, 160), group)
    exact_IO = weight.dequantize(torch.float32).T
    for dtype in weights.DTYPES:
        assert torch.equal(linear(isa, torch.eye(160, dtype=dtype), weight).float(), exact_IO)


def test_nan_in_a_token_changes_no_other_token(isa) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, x_TI = random_weight("bf16", (33, 70), 0, generator), torch.randn(6, 70, generator=generator)
    x_TI[2, 69] = float("nan")
    y_TO = linear(isa, x_TI, weight)
    assert y_TO[2].isnan().all() and not y_TO[[0, 1, 3, 4, 5]].isnan().any()


def test_leading_shapes_bias_no_tokens_and_strides(isa) -> None:
    generator = torch.Generator().manual_seed(6)
    weight, bias = random_weight("fp32", (7, 12), 0, generator), torch.randn(7, generator=generator)
    x = torch.randn(2, 3, 12, generator=generator)
    torch.testing.assert_close(linear(isa, x, weight, bias), torch.nn.functional.linear(x, weight.values, bias))
    assert linear(isa, x[:0], weight).shape == (0, 3, 7)
    assert torch.equal(linear(isa, x.mT.contiguous().mT, weight), linear(isa, x, weight))


def test_a_wrong_dtype_width_or_instruction_set_is_rejected() -> None:
    weight = random_weight("fp32", (7, 12), 0, torch.Generator())
    with pytest.raises(ValueError, match="float64"):
        linear("portable", torch.zeros(12, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match="width 11"):
        linear("portable", torch.zeros(11), weight)
    with pytest.raises(SoliError, match="SOLI_CPU_ISA is 'sse9', but this machine has portable"):
        isa_number("sse9", library().best_isa)
