"""Which parameters decay, what Muon's update is, and that the state round-trips as named tensors."""

import pytest
import torch

from soli.errors import SoliError
from soli.train.optimizer import Optimizer, orthogonalise
from soli.train.settings import OptimizerSettings
from tests.train.toy import tiny_model


def stepped(name: str, seed: int = 0, **fields: float):
    model = tiny_model(seed)
    optimizer = Optimizer(model, OptimizerSettings(name=name, **fields), torch.float32)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model, optimizer


def test_orthogonalise_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((12, 20), (20, 12), (3, 8, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), torch.float32))
        assert values.min() > 0.6 and values.max() < 1.3


def test_a_stack_of_experts_is_orthogonalised_expert_by_expert():
    torch.manual_seed(0)
    stack = torch.randn(4, 6, 9)
    alone = torch.stack([orthogonalise(matrix, torch.float32) for matrix in stack])
    torch.testing.assert_close(orthogonalise(stack, torch.float32), alone)


def test_gate_and_up_are_two_matrices_though_they_share_a_tensor():
    model, optimizer = stepped("muon", weight_decay=0.0)
    stack = model.layers[1].mlp.experts.gate_up_proj  # (E, 2F, D)
    before = stack.detach().clone()
    optimizer.step(0.01)
    for half in (before - stack.detach()).chunk(2, dim=1):
        values = torch.linalg.svdvals(half / (0.01 * 0.2 * 32**0.5))
        assert values.min() > 0.6 and values.max() < 1.3


def test_an_expert_without_gradient_gets_no_update():
    assert not orthogonalise(torch.zeros(2, 4, 4), torch.float32).any()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_vectors_do_not_decay_and_matrices_do(name):
    model, optimizer = stepped(name, weight_decay=0.5)
    for p in model.parameters():
        p.grad.zero_()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer.step(0.1)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[key] * (1 if p.dim() < 2 else 0.95), msg=key)


def test_muons_update_has_adamws_size():
    model, optimizer = stepped("muon", weight_decay=0.0)
    before = model.layers[1].self_attn.o_proj.weight.detach().clone()
    optimizer.step(0.01)
    moved = (model.layers[1].self_attn.o_proj.weight.detach() - before) / 0.01
    assert 0.1 < moved.square().mean().sqrt() < 0.3  # 0.2 by design: AdamW's typical step


def test_the_gradient_is_clipped_to_the_norm():
    model, optimizer = stepped("adamw", clip=1.0)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert optimizer.step(0.0) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trips_through_named_tensors(name):
    model, optimizer = stepped(name)
    optimizer.step(0.01)
    other_model, other = stepped(name, seed=5)
    other_model.load_state_dict(model.state_dict())
    other.load_state(optimizer.state())
    for m, o in ((model, optimizer), (other_model, other)):
        for p in m.parameters():
            p.grad = torch.full_like(p, 0.1)
        o.step(0.01)
    for (key, a), b in zip(model.named_parameters(), other_model.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_state_of_another_model_is_rejected_by_name():
    _, optimizer = stepped("adamw")
    optimizer.step(0.01)
    state = optimizer.state()
    missing = next(key for key in state if key.startswith("norm.weight"))
    with pytest.raises(SoliError, match="ghost"):
        stepped("adamw")[1].load_state({**state, "ghost|exp_avg": state[missing]})
    with pytest.raises(SoliError, match=r"nothing for norm\.weight"):
        stepped("adamw")[1].load_state({k: v for k, v in state.items() if not k.startswith("norm.weight|")})


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(name, value):
    model, optimizer = stepped(name)
    model.layers[1].mlp.experts.down_proj.grad[3, 0, 0] = value
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(SoliError, match="norm is not finite"):
        optimizer.step(0.1)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not optimizer.state()


def test_finite_gradients_whose_norm_overflows_are_rejected():
    model, optimizer = stepped("adamw")
    model.norm.weight.grad.fill_(3e38)
    with pytest.raises(SoliError, match="norm is not finite"):
        optimizer.step(0.1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bf16_moments_are_stored_so_and_give_nearly_the_updates_of_fp32(name):
    states = {}
    for moments in ("fp32", "bf16"):
        model, optimizer = stepped(name, moments=moments)
        start = model.layers[0].mlp.up_proj.weight.detach().clone()
        for step in range(10):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + step))
            optimizer.step(0.01)
            if step == 0:
                states[moments, "first"] = model.layers[0].mlp.up_proj.weight.detach().clone()
        dtypes = {value.dtype for value in optimizer.state().values() if value.dim()}
        assert dtypes == {torch.float32 if moments == "fp32" else torch.bfloat16}
        states[moments, "moved"] = model.layers[0].mlp.up_proj.weight.detach() - start
    # The first step uses no rounded moment; later ones differ by bfloat16's rounding, 2^-8 of a moment.
    torch.testing.assert_close(states["bf16", "first"], states["fp32", "first"], rtol=1e-5, atol=1e-7)
    error = (states["bf16", "moved"] - states["fp32", "moved"]).norm() / states["fp32", "moved"].norm()
    assert 0 < error < 0.01


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_resumed_moments_get_the_dtype_of_the_recipe(before, after):
    _, first = stepped("muon", moments=before)
    first.step(0.01)
    _, second = stepped("muon", moments=after)
    second.load_state(first.state())
    second.step(0.01)
    dtype = torch.float32 if after == "fp32" else torch.bfloat16
    assert {value.dtype for value in second.state().values() if value.dim()} == {dtype}
