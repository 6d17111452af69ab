"""Trap 14: an expert that receives no token is normal: no hang, no garbage gradient."""

import pytest
import torch

from soli.kernels import default_backend
from soli.kernels.reference import REFERENCE

experts = default_backend().experts


def parts(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(6, 16, generator=generator).to(dtype)
    gate_up = torch.randn(5, 16, 16, generator=generator).to(dtype).requires_grad_()
    down = torch.randn(5, 16, 8, generator=generator).to(dtype).requires_grad_()
    ids_TK = torch.tensor([[1, 3], [3, 1], [1, 3], [1, 3], [3, 1], [1, 3]])  # 0, 2 and 4 get no token
    weights_TK = torch.rand(6, 2, generator=generator)
    return x_TD, ids_TK, weights_TK, gate_up, down


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_without_tokens_get_zero_gradients_and_change_nothing(dtype: torch.dtype) -> None:
    x_TD, ids_TK, weights_TK, gate_up, down = parts(dtype)
    with torch.no_grad():
        for expert in (0, 2, 4):  # reading them would show in the output
            gate_up[expert] = float("nan")
            down[expert] = float("nan")
    y_TD = experts(x_TD, ids_TK, weights_TK, gate_up, down)
    expected = REFERENCE.experts(x_TD, ids_TK, weights_TK, gate_up, down)
    torch.testing.assert_close(y_TD, expected, rtol=1e-4 if dtype == torch.float32 else 0.05, atol=0.05)
    y_TD.float().square().sum().backward()
    for grad in (gate_up.grad, down.grad):
        assert (grad[[0, 2, 4]] == 0).all()
        assert grad[[1, 3]].isfinite().all() and (grad[[1, 3]] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens_at_all(dtype: torch.dtype) -> None:
    x_TD, ids_TK, weights_TK, gate_up, down = parts(dtype)
    assert experts(x_TD[:0], ids_TK[:0], weights_TK[:0], gate_up, down).shape == (0, 16)
