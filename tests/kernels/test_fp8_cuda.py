"""The GPU's FP8 path on a CPU: scaled_mm and Triton are replaced, everything else is the code that a GPU runs."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from soli.kernels.fp8 import cuda
from soli.kernels.fp8.cuda import Fp8Cuda, blocks, retiled, tiles
from soli.kernels.fp8.emulation import Fp8Emulation
from tests.kernels import triton_stand_in

E4M3 = torch.float8_e4m3fn


def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, output_dtype):  # type: ignore[no-untyped-def]
    """What torch documents for block scales on Hopper: the layouts that it requires, and the product."""
    M, K = a.shape
    N = b.shape[1]
    assert a.dtype == b.dtype == E4M3 and scale_a.dtype == scale_b.dtype == torch.float32
    assert a.stride() == (K, 1) and b.stride() == (1, K) and K % 128 == 0 and N % 16 == 0 and M % 16 == 0
    assert recipe_a == F.ScalingType.BlockWise1x128
    assert scale_a.shape == (M, K // 128) and scale_a.stride(0) == 1
    assert scale_a.shape[1] == 1 or scale_a.stride(1) == M
    scales_a = scale_a.repeat_interleave(128, 1)
    if recipe_b == F.ScalingType.BlockWise1x128:
        assert scale_b.shape == (N, K // 128) and scale_b.stride(0) == 1
        assert scale_b.shape[1] == 1 or scale_b.stride(1) == N
        scales_b = scale_b.repeat_interleave(128, 1).t()
    else:
        rows = -(-K // 128 // 4) * 4
        assert scale_b.shape == (rows, N // 128) and scale_b.stride() == (1, rows)
        scales_b = scale_b[: K // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return ((a.float() * scales_a) @ (b.float() * scales_b)).to(output_dtype)


@pytest.fixture(params=["torch", "triton"])
def gpu(request, monkeypatch):  # type: ignore[no-untyped-def]
    """The GPU's code paths on a CPU, without and with Triton; new memory is poisoned with NaN."""
    monkeypatch.setattr(F, "scaled_mm", scaled_mm, raising=False)
    if request.param == "triton":
        triton_stand_in.install(monkeypatch)
        monkeypatch.setattr(cuda, "_on_gpu", lambda x: True)
    else:
        monkeypatch.setattr(cuda, "has_triton", lambda: False)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    yield request.param
    torch.use_deterministic_algorithms(False)
    sys.modules.pop("soli.kernels.fp8.triton_kernels", None)


def draw(*shape: int, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values * torch.linspace(0.1, 3, shape[-1])


def assert_close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("T", "I", "O"), [(1, 128, 256), (130, 576, 200), (256, 40, 128)])
def test_linear_is_the_emulation(gpu, T: int, I: int, O: int) -> None:  # noqa: E741
    on_gpu: list[Tensor] = []
    emulation: list[Tensor] = []
    for backend, results in ((Fp8Cuda(), on_gpu), (Fp8Emulation(), emulation)):
        x, w = draw(T, I, seed=0).requires_grad_(), draw(O, I, seed=1).requires_grad_()
        y = backend.linear(x[None], w, torch.ones(O))
        y.backward(draw(1, T, O, seed=2))
        results += [y.detach(), x.grad, w.grad]
    for ours, emulated in zip(on_gpu, emulation, strict=True):
        assert_close(ours, emulated)


@pytest.mark.parametrize(("D", "width"), [(128, 256), (256, 128), (96, 40)])
def test_experts_are_the_emulation_with_empty_experts_and_odd_counts(gpu, D: int, width: int) -> None:
    T, E, K = 75, 5, 3
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(4, generator=generator)[:K] for _ in range(T)])
    ids[ids == 2] = 4  # no token selects expert 2
    on_gpu: list[Tensor] = []
    emulation: list[Tensor] = []
    for backend, results in ((Fp8Cuda(), on_gpu), (Fp8Emulation(), emulation)):
        x, weights = draw(T, D, seed=0).requires_grad_(), draw(T, K, seed=1).sigmoid().requires_grad_()
        gate_up, down = draw(E, 2 * width, D, seed=2).requires_grad_(), draw(E, D, width, seed=3).requires_grad_()
        y = backend.experts(x, ids, weights, gate_up, down)
        y.backward(draw(T, D, seed=4))
        results += [y.detach(), x.grad, weights.grad, gate_up.grad, down.grad]
    for ours, emulated in zip(on_gpu, emulation, strict=True):
        assert_close(ours, emulated)
    assert not on_gpu[3][2].any() and not on_gpu[4][2].any()


def test_operands_by_triton_are_those_by_torch_to_the_bit(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    x = draw(150, 300, seed=0)
    x[3, :128] = 0  # a tile of zeros
    x[:, 140] = 1e-42  # one of denormals
    stack = torch.stack([draw(256, 640, seed=seed) for seed in range(3)])
    constructors = [
        lambda: tiles(x), lambda: tiles(x, transposed=True), lambda: retiled(tiles(x)), lambda: blocks(x),
        lambda: blocks(x, transposed=True), lambda: blocks(stack), lambda: blocks(stack, transposed=True),
    ]  # fmt: skip
    plain = [construct() for construct in constructors]
    triton_stand_in.install(monkeypatch)
    monkeypatch.setattr(cuda, "_on_gpu", lambda x: True)
    for construct, expected in zip(constructors, plain, strict=True):
        operand = construct()
        assert torch.equal(operand.values_MK.float(), expected.values_MK.float())
        assert torch.equal(operand.scale, expected.scale) and operand.blocks == expected.blocks


@pytest.mark.parametrize("counts", [[0, 0, 300], [128, 129, 1], [0, 1, 0], [0, 0, 0]])
def test_each_experts_rows_start_a_new_tile(counts: list[int]) -> None:
    ids = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    layout = cuda.lay_out_rows(ids[:, None], len(counts))
    expert_of_row = layout.expert_tile.repeat_interleave(128)
    assert expert_of_row.shape[0] == layout.rows and layout.row_P.unique().numel() == len(ids)
    assert torch.equal(expert_of_row[layout.row_P], ids[layout.order_P].to(torch.int32))
    tiles_needed = [-(-count // 128) for count in counts]
    assert layout.first_tile.tolist() == [sum(tiles_needed[:e]) for e in range(len(counts) + 1)]
    assert (layout.expert_tile[layout.first_tile[-1] :] == -1).all()


def test_a_cpu_lacks_cuda() -> None:
    assert cuda.missing_requirement(torch.device("cpu")) == "the device is cpu, not cuda"
