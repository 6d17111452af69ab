"""Trap 4: a bias moves by gamma towards the expert that had too few tokens, and is never centred."""

import torch

from soli.train.balance import step_bias
from tests.train.toy import tiny_model


def test_step_is_gamma_times_sign_of_mean_minus_load():
    model = tiny_model(num_nextn_predict_layers=0)
    (_, layer), counts = next(model.moe_layers()), torch.tensor([[0, 4, 4, 4, 5, 3, 4, 8]])  # mean 4
    step_bias(model, counts, gamma=0.5)
    expected = torch.tensor([0.5, 0, 0, 0, -0.5, 0.5, 0, -0.5])
    assert torch.equal(layer.gate.e_score_correction_bias, expected)


def test_biases_are_not_centred():
    model = tiny_model(num_nextn_predict_layers=0)
    (_, layer), counts = next(model.moe_layers()), torch.tensor([[9, 1, 1, 1, 1, 1, 1, 1]])
    for _ in range(3):
        step_bias(model, counts, gamma=0.1)
    torch.testing.assert_close(layer.gate.e_score_correction_bias.mean(), torch.tensor(0.3 * 6 / 8))


def test_gamma_zero_changes_nothing():
    model = tiny_model()
    step_bias(model, torch.randint(1, 9, (2, 8)), gamma=0.0)
    assert all(not layer.gate.e_score_correction_bias.any() for _, layer in model.moe_layers())
