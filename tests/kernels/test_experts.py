"""The default backend's experts against the token-by-token reference, over random shapes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soli.kernels import default_backend
from soli.kernels.reference import REFERENCE


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 9), E=st.integers(1, 7), D=st.integers(1, 17), F=st.integers(1, 13),
    K=st.integers(1, 7), seed=st.integers(0, 99), bf16=st.booleans(),
)  # fmt: skip
def test_equals_the_reference(T: int, E: int, D: int, F: int, K: int, seed: int, bf16: bool) -> None:
    K = min(K, E)
    dtype = torch.bfloat16 if bf16 else torch.float64
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=generator).to(dtype)
    gate_up = torch.randn(E, 2 * F, D, generator=generator).to(dtype)
    down = torch.randn(E, D, F, generator=generator).to(dtype)
    ids_TK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    weights_TK = torch.rand(T, K, generator=generator)
    exact = REFERENCE.experts(x_TD.double(), ids_TK, weights_TK.double(), gate_up.double(), down.double())
    y_TD = default_backend().experts(x_TD, ids_TK, weights_TK, gate_up, down)
    assert y_TD.dtype == dtype
    bound = 0.03 if bf16 else 1e-6
    assert (y_TD.double() - exact).abs().max() <= bound * exact.abs().max().clamp_min(1.0)


def test_a_token_does_not_depend_on_its_batch() -> None:
    generator, experts = torch.Generator().manual_seed(0), default_backend().experts
    x_TD, gate_up = torch.randn(8, 16, generator=generator), torch.randn(6, 24, 16, generator=generator)
    down, weights_TK = torch.randn(6, 16, 12, generator=generator), torch.rand(8, 3, generator=generator)
    ids_TK = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(8)])
    together = experts(x_TD, ids_TK, weights_TK, gate_up, down)
    for t in range(8):
        alone = experts(x_TD[t : t + 1], ids_TK[t : t + 1], weights_TK[t : t + 1], gate_up, down)
        torch.testing.assert_close(alone[0], together[t], rtol=1e-5, atol=1e-5)
