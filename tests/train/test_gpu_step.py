"""A training step on a GPU gives the losses and gradients of the CPU, and reads nothing back on the way."""

from __future__ import annotations

import pytest
import torch

from soli.config import preset
from soli.model import Transformer
from soli.train.graph import GraphedStep
from soli.train.losses import Losses, compute_losses, count_targets
from soli.train.precision import use_fp8

pytestmark = pytest.mark.gpu


def step(model: Transformer, window_BW: torch.Tensor) -> Losses:
    totals = count_targets(window_BW.cpu(), 1, eos_id=1)
    losses = compute_losses(model, window_BW, totals, eos_id=1)
    losses.total(0.3, 1e-4).backward()
    return losses


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 3e-2), ("fp8", 3e-1)])
def test_losses_and_gradients_are_those_of_a_cpu(precision: str, bound: float) -> None:
    window = torch.randint(3, 500, (4, 66), generator=torch.Generator().manual_seed(0))
    models, losses = {}, {}
    for device in ("cpu", "cuda"):
        model = Transformer(preset("nano"), device="cpu", dtype=torch.float32)
        model.init_weights(torch.Generator().manual_seed(0))
        models[device] = model = model.to(device)
        if device == "cuda":
            model.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            if precision == "fp8":
                use_fp8(model)
        losses[device] = float(step(model, window.to(device)).next_token)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=bound / 10)
    on_gpu = dict(models["cuda"].named_parameters())
    for name, p in models["cpu"].named_parameters():
        if "mlp.gate" not in name and "experts" not in name:  # a token near a tie may choose otherwise
            other = on_gpu[name].grad.cpu()
            assert float((other - p.grad).norm()) <= bound * float(p.grad.norm()) + 1e-7, name


@pytest.mark.parametrize("fp8", [False, True])
def test_forward_and_backward_wait_for_nothing(fp8: bool) -> None:
    model = Transformer(preset("nano"), device="cuda", dtype=torch.float32)
    model.init_weights(torch.Generator("cuda").manual_seed(0))
    model.compute_dtype = torch.bfloat16
    if fp8:
        use_fp8(model)
    window = torch.randint(3, 500, (4, 66), device="cuda")
    totals = count_targets(window.cpu(), 1, eos_id=1)
    for mode in ("default", "error"):  # the first compiles and allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            compute_losses(model, window, totals, eos_id=1).total(0.3, 1e-4).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_replayed_step_is_the_step_of_its_window_weights_and_lambda(precision: str) -> None:
    model = Transformer(preset("nano"), device="cuda", dtype=torch.float32)
    model.init_weights(torch.Generator("cuda").manual_seed(0))
    model.compute_dtype = torch.bfloat16
    if precision == "fp8":
        use_fp8(model)
    graphed, generator = GraphedStep(model, 1e-4, eos_id=1), torch.Generator().manual_seed(1)
    for number, weight in enumerate((0.3, 0.3, 0.3, 0.1)):
        window = torch.randint(1, 500, (16, 258), generator=generator)
        totals = count_targets(window, 1, eos_id=1)
        model.zero_grad()
        found = graphed(window, totals, weight)
        assert (found is None) == (number == 0)  # its shape is new
        if found is None:
            continue
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        losses, counts = found[0].clone(), found[1]
        model.zero_grad()
        expected = compute_losses(model, window.cuda(), totals, eos_id=1)
        expected.total(weight, 1e-4).backward()
        assert torch.equal(counts, expected.counts_LE)
        torch.testing.assert_close(losses, expected.parts(), rtol=1e-5, atol=1e-6)
        for name, p in model.named_parameters():
            if p.grad is not None:
                assert float((gradients[name] - p.grad).norm()) <= 3e-2 * float(p.grad.norm()) + 1e-7, name
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-0.01)
