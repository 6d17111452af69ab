"""All experts of a layer in C++, against the reference in float64, on every instruction set here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soli.errors import SoliError
from soli.formats.quantized import QuantizedWeight
from soli.kernels import cpu
from soli.kernels.cpu import ExpertTable
from soli.kernels.cpu.native import ISAS
from soli.kernels.reference import REFERENCE
from tests.kernels import weights
from tests.kernels.weights import expert_table, needs_kernels, random_weight

pytestmark = needs_kernels

#: Error of float32 tokens, and of bfloat16 tokens beyond it (hidden row and result are each rounded once), relative to
#: the sum of all terms' magnitudes.
BOUND, BOUND_BF16 = 4e-6, 2.0**-7


@pytest.fixture(params=weights.isas())
def isa(request):
    return request.param


def experts(isa: str, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, table: ExpertTable) -> Tensor:
    return cpu.experts(ISAS.index(isa), x_TD, ids_TK, weights_TK, table)


def exact(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, isa: str
) -> tuple[Tensor, Tensor]:
    """The layer in float64 and how far a result may be from it."""
    x, w = weights.as_multiplied(x_TD, isa, gate_up.format).double(), weights_TK.double()
    up_E2FD, down_EDF = gate_up.dequantize(torch.float64), down.dequantize(torch.float64)
    y_TD = REFERENCE.experts(x, ids_TK, w, up_E2FD, down_EDF)
    limit_TD = torch.zeros_like(y_TD)
    for t, ids in enumerate(ids_TK.tolist()):
        for e, weight in zip(ids, w[t], strict=True):
            gate, up = (up_E2FD[e] @ x[t]).chunk(2)
            terms, up_terms = (up_E2FD[e].abs() @ x[t].abs()).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            limit_TD[t] += weight * BOUND * (down_EDF[e].abs() @ (1.1 * terms * up_terms + hidden.abs()))
            if x_TD.dtype == torch.bfloat16:
                limit_TD[t] += weight * BOUND_BF16 * (down_EDF[e].abs() @ hidden.abs())
            if weights.rounds_tokens(isa, down.format, x_TD.dtype):  # half of one of 127 steps up to the largest of 128
                steps = torch.cat([part.abs().amax() / 127 * torch.ones_like(part) for part in hidden.split(128)])
                limit_TD[t] += weight * 0.51 * (down_EDF[e].abs() @ steps)
    return y_TD, limit_TD


def random_routing(T: int, E: int, K: int, how: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Expert ids and weights: any experts, or the same K for all tokens."""
    one = torch.randperm(E, generator=generator)[:K]
    each = [one if how == "one" else torch.randperm(E, generator=generator)[:K] for _ in range(T)]
    return torch.stack(each), torch.rand(T, K, generator=generator)


def check(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, isa: str
) -> None:
    """Within the bound, and every token has the same bits alone."""
    table = expert_table(gate_up, down)
    y_TD = experts(isa, x_TD, ids_TK, weights_TK, table)
    exact_TD, limit_TD = exact(x_TD, ids_TK, weights_TK, gate_up, down, isa)
    assert y_TD.dtype == x_TD.dtype and ((y_TD.double() - exact_TD).abs() <= limit_TD).all()
    for t in range(len(x_TD)):
        rows = slice(t, t + 1)
        assert torch.equal(experts(isa, x_TD[rows], ids_TK[rows], weights_TK[rows], table)[0], y_TD[t])


@pytest.mark.parametrize("format", weights.FORMATS)
@settings(weights.SETTINGS, max_examples=8)
@given(
    T=st.integers(1, 14), E=st.integers(1, 9), K=st.integers(1, 4), D=st.integers(1, 150), F=st.integers(1, 140),
    group=st.sampled_from((32, 64)), how=st.sampled_from(("any", "one")), half=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_is_equation_12_and_no_token_depends_on_another(isa, format, T, E, K, D, F, group, how, half, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    D, F = weights.inputs(format, D, group), weights.inputs(format, F, 128 if format == "fp8" else group)
    F = 128 if format == "fp8" else F
    gate_up = random_weight(format, (E, 2 * F, D), group, generator)
    down = random_weight(format, (E, D, F), group, generator)
    ids_TK, weights_TK = random_routing(T, E, min(K, E), how, generator)
    x_TD = torch.randn(T, D, generator=generator).to(torch.bfloat16 if half else torch.float32)
    check(x_TD, ids_TK, weights_TK, gate_up, down, isa)


@pytest.mark.parametrize("format", weights.FORMATS)
def test_matrices_too_large_for_a_cache_are_read_in_long_row_blocks_with_the_same_bits(isa, format) -> None:
    generator = torch.Generator().manual_seed(1)
    gate_up = random_weight(format, (4, 2 * 640, 704), 32, generator)
    down = random_weight(format, (4, 704, 640), 32, generator)
    ids_TK, weights_TK = random_routing(17, 4, 2, "any", generator)
    for dtype in weights.DTYPES:
        check(torch.randn(17, 704, generator=generator).to(dtype), ids_TK, weights_TK, gate_up, down, isa)


def layer(
    format: str = "bf16", E: int = 6, D: int = 128, F: int = 96, seed: int = 0
) -> tuple[QuantizedWeight, QuantizedWeight]:
    generator = torch.Generator().manual_seed(seed)
    return random_weight(format, (E, 2 * F, D), 32, generator), random_weight(format, (E, D, F), 32, generator)


def test_experts_may_be_anywhere_in_memory(isa) -> None:
    gate_up, down = layer("int8")
    matrices = [(half[:96].clone(), half[96:].clone()) for half in gate_up.values]
    scales = [(half[:96].clone(), half[96:].clone()) for half in gate_up.scale]
    gates, ups = (
        [QuantizedWeight("int8", m[i], s[i], (96, 128), 32) for m, s in zip(matrices, scales, strict=True)]
        for i in (0, 1)
    )
    separate = ExpertTable.from_matrices(gates, ups, [down[e] for e in range(6)])
    ids_TK, weights_TK = random_routing(5, 6, 2, "any", torch.Generator().manual_seed(1))
    x_TD = torch.randn(5, 128)
    stacked = experts(isa, x_TD, ids_TK, weights_TK, expert_table(gate_up, down))
    assert torch.equal(experts(isa, x_TD, ids_TK, weights_TK, separate), stacked)


def test_formats_may_differ_between_up_and_down(isa) -> None:
    generator = torch.Generator().manual_seed(2)
    gate_up = random_weight("int4", (4, 256, 64), 32, generator)
    down = random_weight("int8", (4, 64, 128), 64, generator)
    ids_TK, weights_TK = random_routing(3, 4, 2, "any", generator)
    x_TD = torch.randn(3, 64, generator=generator)
    exact_TD, limit_TD = exact(x_TD, ids_TK, weights_TK, gate_up, down, isa)
    y_TD = experts(isa, x_TD, ids_TK, weights_TK, expert_table(gate_up, down))
    assert ((y_TD.double() - exact_TD).abs() <= limit_TD).all()


def test_threads_batches_and_the_order_of_ids_do_not_change_a_bit(isa) -> None:
    table = expert_table(*layer(E=40, D=64, F=32))
    ids_TK, weights_TK = random_routing(200, 40, 3, "any", torch.Generator().manual_seed(1))
    x_TD, threads = torch.randn(200, 64, generator=torch.Generator().manual_seed(7)).bfloat16(), torch.get_num_threads()
    y_TD = experts(isa, x_TD, ids_TK, weights_TK, table)
    try:
        torch.set_num_threads(3)
        assert torch.equal(experts(isa, x_TD, ids_TK.flip(1), weights_TK.flip(1), table), y_TD)
    finally:
        torch.set_num_threads(threads)
    parts = [experts(isa, x_TD[a:b], ids_TK[a:b], weights_TK[a:b], table) for a, b in ((0, 1), (1, 90), (90, 200))]
    assert torch.equal(torch.cat(parts), y_TD)


def test_every_number_of_the_result_is_written(isa, monkeypatch) -> None:
    table, empty_like = expert_table(*layer()), torch.empty_like
    ids_TK, weights_TK = random_routing(9, 6, 2, "one", torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "empty_like", lambda x: empty_like(x).fill_(float("nan")))
    assert not experts(isa, torch.randn(9, 128), ids_TK, weights_TK, table).isnan().any()
    assert experts(isa, torch.randn(0, 128), ids_TK[:0], weights_TK[:0], table).shape == (0, 128)


def test_silu_is_exact_for_large_magnitudes(isa) -> None:
    """One weight of 1 everywhere: y = silu(x) * x, from where silu is 0 to where it is x."""
    one = random_weight("fp32", (1, 2, 1), 0, torch.Generator())
    one.values.fill_(1.0)
    down = QuantizedWeight("fp32", torch.ones(1, 1, 1), None, (1, 1, 1), 0)
    x_T1 = torch.tensor([-1e30, -100.0, -88.0, -20.0, -1.0, -1e-6, 0.0, 1e-6, 0.5, 3.0, 88.0, 100.0, 1e15])[:, None]
    ids_TK = torch.zeros(len(x_T1), 1, dtype=torch.int64)
    y_T1 = experts(isa, x_T1, ids_TK, torch.ones(len(x_T1), 1), expert_table(one, down))
    exact_T1 = torch.nn.functional.silu(x_T1.double()) * x_T1.double()
    torch.testing.assert_close(y_T1.double(), exact_T1, rtol=1e-6, atol=1e-30)


def test_what_does_not_fit_is_rejected() -> None:
    gate_up, down = layer()
    table, x_TD = expert_table(gate_up, down), torch.zeros(2, 128)
    for wrong in (-1, 6):
        with pytest.raises(IndexError, match="expert id"):
            experts("portable", x_TD, torch.full((2, 1), wrong), torch.ones(2, 1), table)
    with pytest.raises(ValueError, match="do not fit"):
        experts("portable", x_TD, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), table)
    with pytest.raises(SoliError, match="does not fit"):
        expert_table(down, gate_up)
    with pytest.raises(SoliError, match="same number"):
        ExpertTable.from_matrices([gate_up[0]], [gate_up[0]], [down[0], down[1]])
