"""Which implementation answers, and that the model says the same whichever does."""

import pytest
import torch
from torch.nn import functional as F

from soli import kernels, load_model
from soli.errors import SoliError
from soli.formats.quantized import QuantizedWeight
from soli.kernels import cpu, dispatch, torch_linear
from soli.model.attention import attend
from tests.kernels.weights import needs_kernels, random_weight


@pytest.fixture
def counted(monkeypatch):
    """Names of the C++ entries that were called."""
    calls: list[str] = []
    for name in ("plain_linear", "linear", "experts"):
        plain = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, plain=plain, name=name: (calls.append(name), plain(*a))[1])
    monkeypatch.delenv("SOLI_KERNELS", raising=False)
    return calls


@needs_kernels
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.08)])
def test_logits_agree_whoever_computes(monkeypatch, dtype, bound) -> None:
    model, logits = load_model("nano", dtype=dtype, mtp=False), {}
    ids_BT = torch.randint(0, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    for way in dispatch.WAYS:
        monkeypatch.setenv("SOLI_KERNELS", way)
        with torch.inference_mode():
            logits[way] = model(ids_BT).double()
    span = logits["reference"].abs().max()
    for way in ("torch", "cpu"):
        assert (logits[way] - logits["reference"]).abs().max() <= bound * span, way


@needs_kernels
def test_one_layer_of_experts_is_one_call_and_a_gradient_is_torchs(counted) -> None:
    gate_up, down = torch.randn(4, 6, 8, requires_grad=True), torch.randn(4, 8, 3, requires_grad=True)
    inputs = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    with torch.no_grad():
        fast = kernels.experts(*inputs, gate_up, down)
    assert counted == ["experts"]
    slow = kernels.experts(*inputs, gate_up, down)
    slow.sum().backward()
    assert counted == ["experts"] and gate_up.grad is not None
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_quantized_weights_go_to_cpp_unless_experts_differ_in_format(counted) -> None:
    generator = torch.Generator().manual_seed(0)

    def experts(last: str) -> kernels.QuantizedExperts:
        formats = ("int4", last)
        parts = [[random_weight(f, (32, 32), 32, generator) for f in formats] for _ in range(3)]
        return kernels.QuantizedExperts(*(tuple(part) for part in parts))

    inputs = torch.randn(3, 32), torch.randint(0, 2, (3, 1)), torch.rand(3, 1)
    kernels.quantized_linear(inputs[0], random_weight("int8", (5, 32), 32, generator))
    same, mixed = experts("int4"), experts("int8")
    kernels.quantized_experts(*inputs, same), kernels.quantized_experts(*inputs, same)
    assert counted == ["linear", "experts", "experts"]
    assert kernels.quantized_experts(*inputs, mixed).shape == (3, 32) and len(counted) == 3


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
def test_what_cpp_cannot_take_goes_to_torch(counted, x, weight) -> None:
    assert kernels.linear(x, weight).shape == (2, 3) and not counted


def test_an_unknown_way_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("SOLI_KERNELS", "magic")
    with pytest.raises(SoliError, match="SOLI_KERNELS is 'magic': choose one of reference, torch, cpu"):
        kernels.linear(torch.zeros(1, 2), torch.zeros(3, 2))


def test_without_cpp_everything_is_still_answered(monkeypatch) -> None:
    monkeypatch.delenv("SOLI_KERNELS", raising=False)
    monkeypatch.setattr(cpu, "available", lambda: False)
    weight = QuantizedWeight("int8", torch.ones(3, 32, dtype=torch.int8), torch.ones(3, 1).half(), (3, 32), 32)
    assert torch.equal(kernels.quantized_linear(torch.ones(1, 32), weight), torch.full((1, 3), 32.0))
    assert kernels.linear(torch.zeros(4, 2), torch.zeros(3, 2)).shape == (4, 3)


def test_bfloat16_is_multiplied_as_float32_where_torch_has_no_products_of_it(monkeypatch, counted) -> None:
    x_TI, weight = torch.randn(64, 96).bfloat16(), torch.randn(32, 96).bfloat16()
    exact = F.linear(x_TI.float(), weight.float()).bfloat16()
    monkeypatch.setattr(torch_linear, "narrow_products", lambda: False)
    with torch.no_grad():
        assert torch.equal(torch_linear.linear(x_TI, weight), exact)
        torch.testing.assert_close(kernels.linear(x_TI, weight), exact)
        assert counted == (["plain_linear"] if cpu.available() else [])  # however many tokens
        q, k, v = (torch.randn(1, 2, 9, width).bfloat16() for width in (12, 12, 8))
        wide = attend(q.float(), k.float(), v.float(), None, 0.3)
        assert torch.equal(attend(q, k, v, None, 0.3), wide.bfloat16())
    assert not torch_linear.widens(x_TI)  # a gradient would keep the copies
    monkeypatch.setattr(torch_linear, "narrow_products", lambda: True)
    with torch.no_grad():
        assert not torch_linear.widens(x_TI)
