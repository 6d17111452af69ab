"""Integer formats: round trips, stated errors, the search against plain rounding, the layout of int4, rejections."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from soli.errors import SoliError
from soli.formats import integer
from soli.formats.quantized import INT4, INT8

SEEDS = st.integers(0, 2**32 - 1)
GROUPS = st.sampled_from(integer.GROUPS)
CODECS = {8: INT8, 4: INT4}
MAGNITUDES = st.integers(-40, 15)  # powers of two: a normal weight from below float16's smallest scale to its largest


def weight(rows: int, columns: int, seed: int, exponent: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    matrix *= torch.rand(rows, columns, generator=generator) < 0.9  # some exact zeros
    return matrix * 2.0**exponent


def through(original: Tensor, bits: int, group: int = 32) -> Tensor:
    """A weight in integers and back."""
    return CODECS[bits].quantize(original, group).dequantize(torch.float32)


def in_groups(matrix: Tensor, group: int) -> Tensor:
    return matrix.double().reshape(-1, group)


@settings(max_examples=60)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), group=GROUPS, seed=SEEDS, exponent=MAGNITUDES)
def test_int8_stays_within_half_a_scale(rows: int, groups: int, group: int, seed: int, exponent: int) -> None:
    original = weight(rows, groups * group, seed, exponent)
    quantized = INT8.quantize(original, group)
    assert quantized.values.dtype == torch.int8 and quantized.values.shape == original.shape
    assert quantized.values.min() >= -127
    error = in_groups(quantized.dequantize(torch.float32), group) - in_groups(original, group)
    scale = quantized.scale.double().reshape(-1, 1)
    assert (error.abs() <= scale / 2 * (1 + 1e-6)).all()
    largest = in_groups(original, group).abs().amax(1, keepdim=True)
    assert (scale <= 1.001 * largest / 127 + 2**-24).all()


@settings(max_examples=60)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), group=GROUPS, seed=SEEDS, exponent=MAGNITUDES)
def test_int4_stays_within_its_bound_and_beats_plain_rounding(
    rows: int, groups: int, group: int, seed: int, exponent: int
) -> None:
    original = weight(rows, groups * group, seed, exponent)
    quantized = INT4.quantize(original, group)
    assert quantized.values.dtype == torch.uint8 and quantized.values.shape == (rows, groups * group // 2)
    exact = in_groups(original, group)
    error = (in_groups(quantized.dequantize(torch.float32), group) - exact).square().mean(1, keepdim=True).sqrt()
    largest = exact.gather(1, exact.abs().argmax(1, keepdim=True))
    assert (error <= largest.abs() / 8 + 2**-21).all()
    scale = (largest / -8).half().double()
    scale = torch.where(scale == 0, 2.0**-24, scale)
    plain = ((exact / scale).round().clamp(-8, 7) * scale - exact).square().mean(1, keepdim=True).sqrt()
    assert (error <= plain * (1 + 1e-5)).all()


@settings(max_examples=40)
@given(seed=SEEDS, bits=st.sampled_from([8, 4]), group=GROUPS, exponent=st.integers(-6, 6))
def test_values_on_the_grid_survive_exactly(seed: int, bits: int, group: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    highest = 127 if bits == 8 else 7
    values = torch.randint(-highest, highest + 1, (3, 2 * group), generator=generator)
    values[:, ::group] = -highest - (bits == 4)
    original = values * 2.0**exponent
    assert torch.equal(through(original, bits, group), original)


def test_int4_bytes_hold_neighbours_sixteen_apart() -> None:
    values = torch.randint(-8, 8, (2, 64), generator=torch.Generator().manual_seed(0))
    values[:, ::32] = -8
    quantized = INT4.quantize(values * 0.25, 32)
    assert (quantized.scale == 0.25).all()
    for row in range(2):
        for run in range(2):
            for j in range(16):
                byte = int(quantized.values[row, run * 16 + j])
                assert (byte & 15) - 8 == values[row, run * 32 + j]
                assert (byte >> 4) - 8 == values[row, run * 32 + j + 16]


def test_errors_of_a_normal_weight_are_those_that_are_stated() -> None:
    original = weight(512, 512, seed=1)
    norm = original.norm()
    rms = {bits: float((through(original, bits) - original).norm() / norm) for bits in (8, 4)}
    assert 0.004 < rms[8] < 0.006 and 0.078 < rms[4] < 0.0803  # 0.0808 without the least-squares step


def test_many_groups_are_searched_like_few(monkeypatch: pytest.MonkeyPatch) -> None:
    original = weight(7, 96, seed=2)
    at_once = INT4.quantize(original, 32)
    monkeypatch.setattr(integer, "CHUNK", 4)
    in_chunks = INT4.quantize(original, 32)
    assert torch.equal(at_once.values, in_chunks.values) and torch.equal(at_once.scale, in_chunks.scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zero(bits: int) -> None:
    zeros = torch.zeros(2, 64)
    quantized = CODECS[bits].quantize(zeros, 32)
    assert (quantized.scale > 0).all() and torch.equal(quantized.dequantize(torch.float32), zeros)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -4e5])
def test_values_that_scales_cannot_reach_are_rejected(bits: int, bad: float) -> None:
    original = torch.ones(3, 64)
    original[1, 40] = bad
    with pytest.raises(SoliError, match="cannot hold"):
        CODECS[bits].quantize(original, 32)
    original[1, 40] = -integer.WEIGHT_MAX
    assert through(original, bits).isfinite().all()


@pytest.mark.parametrize("shape, group", [((4, 48), 32), ((4, 64), 16), ((64,), 32), ((2, 4, 64), 32)])
def test_shapes_that_do_not_fit_are_rejected(shape: tuple[int, ...], group: int) -> None:
    with pytest.raises(SoliError, match="needs"):
        INT4.quantize(torch.ones(shape), group)


FITS = [(256, 128, 128), (192, 128, 64), (96, 128, 32), (256, 32, 32), (80, 128, None)]


@pytest.mark.parametrize("inputs, largest, group", FITS)
def test_the_group_is_the_largest_that_divides(inputs: int, largest: int, group: int | None) -> None:
    assert INT8.fitting_group(inputs, largest) == INT4.fitting_group(inputs, largest) == group
