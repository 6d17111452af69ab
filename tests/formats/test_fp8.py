"""FP8 blocks: round trips, stated error, rejections, and agreement with a block-by-block oracle."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from soli.errors import SoliError
from soli.formats import fp8
from soli.formats.quantized import FP8, Fp8Codec, QuantizedWeight

SIDES = st.integers(1, 300)
SEEDS = st.integers(0, 2**32 - 1)
# Powers of two that put a normal weight anywhere from fp32's denormals to the stated limit.
MAGNITUDES = st.integers(-149, 123)


def codec(ue8m0: bool) -> Fp8Codec:
    return replace(FP8, ue8m0=ue8m0)


def weight(rows: int, columns: int, seed: int, exponent: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    matrix *= torch.rand(rows, columns, generator=generator) < 0.9  # some exact zeros
    return (matrix * 2.0**exponent).float()


@settings(max_examples=60, deadline=None)
@given(rows=SIDES, columns=SIDES, seed=SEEDS, exponent=MAGNITUDES, ue8m0=st.booleans())
def test_round_trip_stays_within_the_stated_error(rows: int, columns: int, seed: int, exponent: int, ue8m0: bool):
    original = weight(rows, columns, seed, exponent)
    quantized = codec(ue8m0).quantize(original)
    assert quantized.values.shape == original.shape
    assert quantized.scale.shape == fp8.scale_shape(rows, columns)
    scale = quantized.scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns].double()
    bound = torch.maximum(original.double().abs() * 2**-4, scale * 2**-10) * (1 + 2**-18)
    assert ((quantized.dequantize(torch.float32).double() - original.double()).abs() <= bound).all()
    assert not ue8m0 or fp8.is_ue8m0(quantized.scale)


@settings(max_examples=40, deadline=None)
@given(rows=SIDES, columns=SIDES, seed=SEEDS, exponent=st.integers(-60, 60), middle=st.sampled_from(["fp32", "bf16"]))
def test_quantizing_again_changes_no_value(rows: int, columns: int, seed: int, exponent: int, middle: str):
    """What fp8 -> bf16 -> fp8 relies on: the values survive, the scales move by bf16's rounding at most."""
    first = FP8.quantize(weight(rows, columns, seed, exponent))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[middle]
    second = FP8.quantize(first.dequantize(dtype))
    assert torch.equal(first.values.float(), second.values.float())
    torch.testing.assert_close(first.scale, second.scale, rtol=2**-8, atol=0)


@settings(max_examples=40, deadline=None)
@given(rows=SIDES, columns=SIDES, seed=SEEDS, exponent=st.integers(-60, 60))
def test_ue8m0_weights_survive_bf16_exactly(rows: int, columns: int, seed: int, exponent: int):
    values = codec(ue8m0=True).quantize(weight(rows, columns, seed, exponent)).dequantize(torch.bfloat16)
    again = codec(ue8m0=True).quantize(values).dequantize(torch.bfloat16)
    assert torch.equal(values, again)


def test_matches_a_block_by_block_oracle():
    original = weight(130, 257, seed=1)
    quantized = FP8.quantize(original)
    for p in range(2):
        for q in range(3):
            block = original[p * 128 : (p + 1) * 128, q * 128 : (q + 1) * 128]
            scale = block.abs().max() / 448
            assert quantized.scale[p, q] == scale
            values = quantized.values[p * 128 : (p + 1) * 128, q * 128 : (q + 1) * 128]
            assert torch.equal(values.float(), (block / scale).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("ue8m0", [False, True])
def test_zeros_denormals_and_the_largest_values(ue8m0: bool):
    zeros = codec(ue8m0).quantize(torch.zeros(200, 130))
    assert (zeros.scale == 1).all() and not zeros.dequantize().any()
    denormal = torch.full((3, 5), 1e-45)
    assert codec(ue8m0).quantize(denormal).dequantize(torch.float32).abs().max() <= 2**-136
    largest = torch.tensor([[2.0**127, -(2.0**127), 1.0]])
    assert codec(ue8m0).quantize(largest).dequantize(torch.float32).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.4e38])
def test_values_that_blocks_cannot_hold_are_rejected(value: float):
    matrix = torch.ones(129, 4)
    matrix[128, 3] = value
    with pytest.raises(SoliError, match=r"NaN, infinite or larger"):
        FP8.quantize(matrix)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0, 1e36])
def test_scales_that_are_not_finite_and_positive_are_rejected(scale: float):
    with pytest.raises(SoliError, match="finite positive"):
        fp8.check_scale(torch.full((1, 1), scale))


def test_input_of_the_wrong_shape_is_rejected():
    with pytest.raises(SoliError, match="need a matrix"):
        FP8.quantize(torch.ones(4))
    with pytest.raises(SoliError, match=r"\(2, 1\)"):
        QuantizedWeight("fp8", FP8.quantize(torch.ones(129, 4)).values, torch.ones(1, 1), (129, 4), 128)


def test_empty_matrix_round_trips():
    quantized = FP8.quantize(torch.empty(0, 130))
    assert quantized.scale.shape == (0, 2) and quantized.dequantize().shape == (0, 130)


def test_error_of_a_gaussian_weight_is_small_but_not_zero():
    original = weight(256, 384, seed=3)
    error = (FP8.quantize(original).dequantize(torch.float32) - original).double()
    assert 0.015 < error.norm() / original.double().norm() < 0.035
    assert 0 < error.abs().max() <= float(original.abs().max()) * 2**-4


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), columns=SIDES, seed=SEEDS, exponent=MAGNITUDES)
def test_tiles_stay_within_the_stated_error(rows: int, columns: int, seed: int, exponent: int):
    original = weight(rows, columns, seed, exponent)
    values_TI, scale_TQ = fp8.quantize_tiles(original)
    assert values_TI.shape == original.shape and values_TI.dtype == torch.float8_e4m3fn
    assert scale_TQ.shape == (rows, -(-columns // 128))
    scale = scale_TQ.repeat_interleave(128, 1)[:, :columns].double()
    bound = torch.maximum(original.double().abs() * 2**-4, scale * 2**-10) * (1 + 2**-18)
    assert ((fp8.dequantize_tiles(values_TI, scale_TQ).double() - original.double()).abs() <= bound).all()


def test_each_tile_has_its_own_scale_and_fails_alone():
    original = weight(3, 300, seed=0)
    original[1, 130] = float("inf")
    values_TI, scale_TQ = fp8.quantize_tiles(original)
    assert scale_TQ[0, 2] == original[0, 256:].abs().max() / 448
    bad = fp8.dequantize_tiles(values_TI, scale_TQ).isnan()
    assert bad[1, 128:256].all() and int(bad.sum()) == 128


def test_tiles_of_nothing():
    for shape in ((0, 130), (0, 5), (3, 0)):
        assert fp8.dequantize_tiles(*fp8.quantize_tiles(torch.empty(shape))).shape == shape
