"""The FP8 products against plain fp32 arithmetic on operands quantized one by one, tile by tile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soli.errors import SoliError
from soli.kernels.fp8.emulation import Fp8Emulation
from soli.kernels.reference import REFERENCE

E4M3 = torch.float8_e4m3fn
EMULATION = Fp8Emulation()


def quantize(values: Tensor) -> Tensor:
    """One tile or block of any shape through E4M3 with one scale."""
    scale = values.abs().max() / 448
    return (values / scale).to(E4M3).float() * scale if scale > 0 else values


def rows(matrix: Tensor) -> Tensor:
    """1x128 tiles, one at a time."""
    parts = [torch.cat([quantize(tile) for tile in row.split(128)]) for row in matrix]
    return torch.stack(parts)


def blocks(matrix: Tensor) -> Tensor:
    """128x128 blocks, one at a time."""
    return torch.cat([torch.cat([quantize(b) for b in row_block.split(128, 1)], 1) for row_block in matrix.split(128)])


def draw(*shape: int, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values * torch.linspace(0.1, 3, shape[-1])


@settings(max_examples=12, deadline=None)
@given(T=st.integers(1, 150), I=st.integers(1, 150), O=st.integers(1, 150), seed=st.integers(0, 99))
def test_three_products_equal_those_of_the_quantized_operands(T: int, I: int, O: int, seed: int):  # noqa: E741
    x, w, grad = draw(T, I, seed=seed), draw(O, I, seed=seed + 1), draw(T, O, seed=seed + 2)
    x.requires_grad_(), w.requires_grad_()
    y = EMULATION.linear(x, w)
    y.backward(grad)
    x_saved = rows(x.detach())
    torch.testing.assert_close(y.detach(), x_saved @ blocks(w.detach()).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, rows(grad) @ blocks(w.detach()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(w.grad, rows(grad.T) @ rows(x_saved.T).T, rtol=1e-4, atol=1e-4)


def test_results_have_the_dtype_of_x_and_the_weights_gradient_that_of_the_master():
    x = draw(2, 3, 16, seed=0).bfloat16().requires_grad_()
    w, bias = draw(24, 16, seed=1).requires_grad_(), draw(24, seed=2)
    y = EMULATION.linear(x, w, bias)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 24)
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and w.grad.dtype == torch.float32


def test_experts_are_near_the_reference_and_one_without_tokens_gets_a_zero_gradient():
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = draw(20, 32, seed=0), draw(5, 48, 32, seed=1), draw(5, 32, 24, seed=2)
    gate_up.requires_grad_(), down.requires_grad_()
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(20)])  # no token selects expert 4
    weights = torch.rand(20, 2, generator=generator)
    y = EMULATION.experts(x, ids, weights, gate_up, down)
    exact = REFERENCE.experts(x, ids, weights, gate_up, down).detach()
    error = float((y.detach() - exact).norm() / exact.norm())
    assert 0.005 < error < 0.08
    y.square().sum().backward()
    for stack in (gate_up, down):
        assert not stack.grad[4].any() and all(stack.grad[e].any() for e in range(4))


def test_a_gradient_that_is_not_finite_stays_visible_and_such_a_weight_is_rejected():
    x, w = draw(4, 16, seed=0).requires_grad_(), draw(8, 16, seed=1).requires_grad_()
    grad = torch.ones(4, 8)
    grad[2, 3] = float("inf")
    EMULATION.linear(x, w).backward(grad)
    assert not x.grad[2].isfinite().any() and not w.grad.isfinite().all()
    with pytest.raises(SoliError, match="NaN, infinite"):
        EMULATION.linear(x, w.detach() * float("nan"))
