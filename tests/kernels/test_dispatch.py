"""Which backend computes, and that a model has the same output with each."""

import copy

import pytest
import torch
from torch.nn import functional as F

from soli import kernels, load_model
from soli.errors import SoliError
from soli.formats.quantized import QuantizedWeight
from soli.kernels import Dispatch, cpu, dispatch, torch_backend
from soli.kernels.cpu import backend as cpu_backend
from soli.model.attention import attend
from soli.model.layers import Linear, set_backend
from tests.kernels.weights import needs_kernels, random_weight


@pytest.fixture
def calls(monkeypatch):
    """Names of the C++ entries that were called."""
    names: list[str] = []
    for name in ("plain_linear", "linear", "experts"):
        plain = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, plain=plain, name=name: (names.append(name), plain(*a))[1])
    return names


@needs_kernels
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.08)])
def test_logits_agree_with_every_backend(dtype, bound) -> None:
    model, logits = load_model("nano", dtype=dtype, mtp=False), {}
    # Tokens for which no two experts are so close that a rounding to bf16 selects the other one.
    ids_BT = torch.randint(0, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(2))
    for name in dispatch.NAMES:
        set_backend(model, Dispatch(name))
        with torch.inference_mode():
            logits[name] = model(ids_BT).double()
    span = logits["reference"].abs().max()
    for name in ("torch", "cpu"):
        assert (logits[name] - logits["reference"]).abs().max() <= bound * span, name


@needs_kernels
def test_one_layer_of_experts_is_one_call_and_a_gradient_is_torchs(calls) -> None:
    gate_up, down = torch.randn(4, 6, 8, requires_grad=True), torch.randn(4, 8, 3, requires_grad=True)
    inputs = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    with torch.no_grad():
        fast = Dispatch().experts(*inputs, gate_up, down)
    assert calls == ["experts"]
    slow = Dispatch().experts(*inputs, gate_up, down)
    slow.sum().backward()
    assert calls == ["experts"] and gate_up.grad is not None
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_quantized_weights_go_to_cpp_unless_experts_differ_in_format(calls) -> None:
    generator, backend = torch.Generator().manual_seed(0), Dispatch()

    def experts(last: str) -> kernels.QuantizedExperts:
        formats = ("int4", last)
        parts = [[random_weight(f, (32, 32), 32, generator) for f in formats] for _ in range(3)]
        return kernels.QuantizedExperts(*(tuple(part) for part in parts))

    inputs = torch.randn(3, 32), torch.randint(0, 2, (3, 1)), torch.rand(3, 1)
    backend.quantized_linear(inputs[0], random_weight("int8", (5, 32), 32, generator))
    same, mixed = experts("int4"), experts("int8")
    backend.quantized_experts(*inputs, same), backend.quantized_experts(*inputs, same)
    assert calls == ["linear", "experts", "experts"]
    assert backend.quantized_experts(*inputs, mixed).shape == (3, 32) and len(calls) == 3


@needs_kernels
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)),
        (torch.randn(2, 4).bfloat16(), torch.randn(3, 4)),  # a master: torch rounds it before the product
        (torch.randn(2, 4), torch.randn(4, 3).T),
        (torch.randn(2, 4, device="meta"), torch.randn(3, 4, device="meta")),
    ],
)
def test_what_cpp_does_not_support_goes_to_torch(calls, x, weight) -> None:
    assert Dispatch().linear(x, weight).shape == (2, 3) and not calls


def test_an_unknown_backend_is_rejected(monkeypatch) -> None:
    monkeypatch.setenv("SOLI_KERNELS", "magic")
    with pytest.raises(SoliError, match="SOLI_KERNELS is 'magic': choose one of reference, torch, cpu"):
        Dispatch.from_environment()


@needs_kernels
def test_an_unknown_instruction_set_is_rejected_at_the_first_product(monkeypatch) -> None:
    monkeypatch.setenv("SOLI_CPU_ISA", "sse9")
    backend = Dispatch.from_environment()
    with pytest.raises(SoliError, match="SOLI_CPU_ISA is 'sse9', but this machine has portable"):
        backend.linear(torch.zeros(1, 12), torch.zeros(7, 12))


def test_the_environment_is_read_once(monkeypatch) -> None:
    monkeypatch.setenv("SOLI_KERNELS", "reference")
    dispatch.default_backend.cache_clear()
    try:
        assert dispatch.default_backend().forced_backend == "reference"
        monkeypatch.setenv("SOLI_KERNELS", "magic")
        layer = Linear(4, 3, None, None)
        assert layer.backend is dispatch.default_backend() and copy.deepcopy(layer).backend is layer.backend
    finally:
        dispatch.default_backend.cache_clear()


def test_without_cpp_everything_is_still_computed(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    weight = QuantizedWeight("int8", torch.ones(3, 32, dtype=torch.int8), torch.ones(3, 1).half(), (3, 32), 32)
    assert torch.equal(Dispatch().quantized_linear(torch.ones(1, 32), weight), torch.full((1, 3), 32.0))
    assert Dispatch().linear(torch.zeros(4, 2), torch.zeros(3, 2)).shape == (4, 3)


def test_bfloat16_is_multiplied_as_float32_where_torch_has_no_products_of_it(monkeypatch, calls) -> None:
    x_TI, weight = torch.randn(64, 96).bfloat16(), torch.randn(32, 96).bfloat16()
    exact = F.linear(x_TI.float(), weight.float()).bfloat16()
    for module in (torch_backend, cpu_backend):
        monkeypatch.setattr(module, "has_bfloat16_products", lambda: False)
    with torch.no_grad():
        assert torch.equal(torch_backend.multiply(x_TI, weight), exact)
        torch.testing.assert_close(Dispatch().linear(x_TI, weight), exact)
        assert calls == (["plain_linear"] if cpu.available() else [])  # however many tokens
        q, k, v = (torch.randn(1, 2, 9, width).bfloat16() for width in (12, 12, 8))
        in_float32 = attend(q.float(), k.float(), v.float(), None, 0.3)
        assert torch.equal(attend(q, k, v, None, 0.3), in_float32.bfloat16())
    assert not torch_backend.needs_float32(x_TI)  # a gradient would keep the copies
    monkeypatch.setattr(torch_backend, "has_bfloat16_products", lambda: True)
    with torch.no_grad():
        assert not torch_backend.needs_float32(x_TI)
