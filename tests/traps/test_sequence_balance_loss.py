"""Trap 7: the sequence-wise loss takes f from the unbiased top-K of all experts, P from scores normalised over all."""

import torch

from soli.model.router import Routing
from soli.train.losses import compute_losses, count_targets, sequence_balance
from tests.train.toy import EOS, tiny_model, windows


def literal(scores_TE: torch.Tensor, K: int) -> float:
    """Equations 17-20 for one sequence, alpha left out, as loops."""
    T, E = scores_TE.shape
    total = 0.0
    for i in range(E):
        f, P = 0.0, 0.0
        for t in range(T):
            row = scores_TE[t].tolist()
            f += row[i] in sorted(row, reverse=True)[:K]
            P += row[i] / sum(row)
        total += (E / (K * T) * f) * (P / T)
    return total


def routing(scores_TE: torch.Tensor, ids_TK: torch.Tensor, bias_E: torch.Tensor) -> Routing:
    return Routing(ids_TK, torch.ones(ids_TK.shape), scores_TE, scores_TE + bias_E, None)


def test_equals_the_equations_sequence_by_sequence():
    torch.manual_seed(0)
    scores_BTE = torch.rand(3, 5, 8)
    ids = scores_BTE.flatten(0, 1).topk(2).indices
    expected = sum(literal(scores_TE, 2) for scores_TE in scores_BTE)
    whole = sequence_balance(routing(scores_BTE.flatten(0, 1), ids, torch.zeros(8)), sequences=3)
    torch.testing.assert_close(whole, torch.tensor(expected))
    assert abs(float(whole) / 3 - literal(scores_BTE.flatten(0, 1), 2)) > 1e-4  # not one long sequence


def test_bias_and_groups_that_moved_the_selection_do_not_matter():
    torch.manual_seed(0)
    scores, bias = torch.rand(6, 8), 5 * torch.rand(8)
    plain = sequence_balance(routing(scores, scores.topk(2).indices, torch.zeros(8)), 1)
    biased = sequence_balance(routing(scores, (scores + bias).topk(2).indices, bias), 1)
    assert not torch.equal(scores.topk(2).indices, (scores + bias).topk(2).indices)
    torch.testing.assert_close(plain, biased)


def test_the_gradient_pushes_down_the_crowded_expert():
    scores = torch.full((4, 8), 0.5)
    scores[:, 0], scores[:, 1] = 0.9, 0.8
    scores.requires_grad_()
    sequence_balance(routing(scores, scores.topk(2).indices, torch.zeros(8)), 1).backward()
    assert scores.grad[:, 0].min() > 0 and scores.grad[:, 2:].max() < 0


def test_every_moe_layer_counts_mtp_too():
    model, window = tiny_model(), windows(2, 18)
    totals = count_targets(window, 1, EOS)
    backbone = model.backbone(window[:, :16])
    step = model.mtp_step(0, backbone.hidden_BTD, window[:, 1:17])
    layers = (*backbone.routing, *step.routing)
    expected = sum(literal(rows, 2) for layer in layers for rows in layer.scores_TE.unflatten(0, (2, 16)))
    losses = compute_losses(model, window, totals, EOS)
    torch.testing.assert_close(losses.balance, torch.tensor(expected / 2), rtol=1e-5, atol=1e-5)
