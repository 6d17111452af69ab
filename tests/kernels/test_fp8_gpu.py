"""FP8 products on a GPU: beside their emulation and float64, random shapes, new memory poisoned with NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soli.kernels import default_backend
from soli.kernels.fp8 import cuda
from soli.kernels.fp8.cuda import Fp8Cuda, blocks, has_triton, product, retiled, tiles
from soli.kernels.fp8.emulation import Fp8Emulation

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned():
    """New memory is filled with NaN; a GPU without FP8 block products skips."""
    reason = cuda.missing_requirement(torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda") * torch.linspace(0.1, 3, shape[-1], device="cuda")


def relative_error(actual: Tensor | None, exact: Tensor | None) -> float:
    """In the Frobenius norm; NaN when an element of `actual` is."""
    assert actual is not None and exact is not None
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize(("T", "I"), [(1, 128), (150, 300), (4096, 7168)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_are_those_of_plain_torch_to_the_bit(T: int, I: int, dtype: torch.dtype) -> None:  # noqa: E741
    x = draw(T, I, seed=0).to(dtype)
    x[0, :128] = 0
    for construct in (
        tiles, blocks, lambda x: tiles(x, transposed=True), lambda x: blocks(x, transposed=True),
        lambda x: retiled(tiles(x)),
    ):  # fmt: skip
        operand, plain = construct(x), construct(x.cpu())
        assert torch.equal(operand.values_MK.float().cpu(), plain.values_MK.float())
        assert torch.equal(operand.scale.cpu(), plain.scale)


@pytest.mark.parametrize(("M", "N", "K"), [(128, 128, 128), (256, 640, 384), (4096, 2048, 7168)])
@pytest.mark.parametrize("second", [tiles, blocks])
def test_product_is_that_of_the_dequantized_operands(M: int, N: int, K: int, second) -> None:  # type: ignore[no-untyped-def]
    a, b = tiles(draw(M, K, seed=0)), second(draw(N, K, seed=1))
    exact_a = a.values_MK.double() * a.scale.t().repeat_interleave(128, 1)
    steps = b.scale[:, : K // 128].repeat_interleave(128, 0) if b.blocks else b.scale.t()
    exact = exact_a @ (b.values_MK.double() * steps.repeat_interleave(128, 1)).t()
    # Tensor cores add the products of a tile in less than fp32.
    assert relative_error(product(a, b, torch.float32), exact) < 1e-3
    assert relative_error(product(a, b, torch.bfloat16), exact) < 4e-3


@pytest.mark.parametrize(("T", "I", "O"), [(1, 128, 128), (130, 576, 200), (333, 40, 128), (4096, 2048, 1024)])
def test_linear_is_near_the_emulation_and_near_float64(T: int, I: int, O: int) -> None:  # noqa: E741
    on_gpu: list[Tensor] = []
    emulation: list[Tensor] = []
    exact: list[Tensor] = []
    for linear, dtype, results in (
        (Fp8Cuda().linear, torch.float32, on_gpu),
        (Fp8Emulation().linear, torch.float32, emulation),
        (lambda x, w: x @ w.t(), torch.float64, exact),
    ):
        x, w = (t.to(dtype).requires_grad_() for t in (draw(T, I, seed=0), draw(O, I, seed=1)))
        y = linear(x, w)
        y.backward(draw(T, O, seed=2).to(dtype))
        results += [y.detach(), x.grad, w.grad]
    for ours, emulated, reference in zip(on_gpu, emulation, exact, strict=True):
        assert relative_error(ours, emulated) < 2e-3 and relative_error(ours, reference) < 0.08


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("T", "E", "D", "width"), [(75, 5, 128, 256), (1000, 48, 256, 128), (64, 6, 96, 40)])
def test_experts_are_near_the_emulation_and_near_high_precision(T: int, E: int, D: int, width: int, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    on_gpu: list[Tensor] = []
    emulation: list[Tensor] = []
    high_precision: list[Tensor] = []
    ids = torch.rand(T, E - 1, generator=generator, device="cuda").topk(3).indices  # no token selects the last expert
    backends = (Fp8Cuda(), on_gpu), (Fp8Emulation(), emulation), (default_backend(), high_precision)
    for backend, results in backends:
        x, weights = draw(T, D, seed=seed).requires_grad_(), draw(T, 3, seed=1).sigmoid().requires_grad_()
        gate_up, down = draw(E, 2 * width, D, seed=2).requires_grad_(), draw(E, D, width, seed=3).requires_grad_()
        y = backend.experts(x, ids, weights, gate_up, down)
        y.backward(draw(T, D, seed=4))
        results += [y.detach(), x.grad, weights.grad, gate_up.grad, down.grad]
    for ours, emulated, exact in zip(on_gpu, emulation, high_precision, strict=True):
        # The down projection's input is quantized after products that differ in the last bits: some values differ.
        assert relative_error(ours, emulated) < 2e-2 and relative_error(ours, exact) < 0.14
    assert not on_gpu[3][-1].any() and not on_gpu[4][-1].any()


def test_nothing_is_read_back_in_a_step() -> None:
    backend = Fp8Cuda()
    x, ids = draw(256, 128, seed=0).requires_grad_(), torch.randint(0, 5, (256, 3), device="cuda")
    weights, gate_up, down = draw(256, 3, seed=1), draw(5, 512, 128, seed=2), draw(5, 128, 256, seed=3)
    backend.experts(x, ids, weights, gate_up, down).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.experts(x, ids, weights, gate_up, down).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
