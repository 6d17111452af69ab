"""Losses against literal transcriptions of their equations, and the fused cross entropy against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from soli.train.losses import compute_losses, count_targets, cross_entropy, token_nll
from tests.train.toy import EOS, tiny_model, windows


@pytest.mark.parametrize("tokens", [7, 600])  # below one chunk, and over a chunk's edge
def test_fused_cross_entropy_equals_torch(tokens):
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(40, (1, tokens)), torch.rand(1, tokens)
    fused = cross_entropy(hidden, head, target, weight)
    fused.mul(3.0).backward()
    got = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    nll = F.cross_entropy((hidden @ head.T)[0], target[0], reduction="none")
    plain = (nll * weight[0]).sum()
    plain.mul(3.0).backward()
    torch.testing.assert_close(fused.double(), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], head.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(token_nll(hidden, head, target)[0].double(), nll, rtol=1e-5, atol=1e-5)


def test_cross_entropy_without_gradient_is_the_same_number():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.randn(20, 8)
    target, weight = torch.randint(20, (2, 5)), torch.rand(2, 5)
    with torch.no_grad():
        measured = cross_entropy(hidden, head, target, weight)
    torch.testing.assert_close(measured, cross_entropy(hidden, head, target, weight).detach())


def test_next_token_loss_is_the_mean_over_the_models_logits():
    model, window = tiny_model(), windows(3, 18)
    losses = compute_losses(model, window, count_targets(window, 1, EOS), EOS)
    expected = F.cross_entropy(model(window[:, :16]).flatten(0, 1), window[:, 1:17].flatten())
    torch.testing.assert_close(losses.next_token, expected)


def test_total_weighs_mean_over_depths_and_alpha():
    model, window = tiny_model(num_nextn_predict_layers=2), windows(2, 19)
    losses = compute_losses(model, window, count_targets(window, 2, EOS), EOS)
    expected = losses.next_token + 0.3 * (losses.mtp[0] + losses.mtp[1]) / 2 + 0.01 * losses.balance
    torch.testing.assert_close(losses.total(0.3, 0.01), expected)


def test_a_model_without_experts_or_mtp_trains_too():
    model, window = tiny_model(n_routed_experts=0, num_nextn_predict_layers=0), windows(2, 17)
    losses = compute_losses(model, window, count_targets(window, 0, EOS), EOS)
    losses.total(0.3, 1e-4).backward()
    assert losses.mtp == () and losses.counts_LE.numel() == 0 and float(losses.balance.detach()) == 0
    assert all(p.grad is not None for p in model.parameters())
