"""Trap 9, the training half: MTP targets shift by one more, and the end of a packed document masks them."""

import pytest
import torch
from torch.nn import functional as F

from soli.train.losses import compute_losses, count_targets, mtp_mask
from tests.train.toy import EOS, tiny_model, windows

#                 position   0  1  2  3    4  5  6    7  8
WINDOW = torch.tensor([[10, 11, 12, EOS, 20, 21, EOS, 30, 31]])


def test_mask_by_hand_depth_one():
    # position i predicts token i + 2; masked where token i + 1 is <|eos|>: at 2 (token 3) and at 5 (token 6)
    expected = torch.tensor([[True, True, False, True, True, False, True]])
    assert torch.equal(mtp_mask(WINDOW, 0, 7, EOS), expected)


def test_mask_by_hand_depth_two():
    # position i predicts token i + 3; masked where token i + 1 or i + 2 is <|eos|>
    expected = torch.tensor([[True, False, False, True, False, False]])
    assert torch.equal(mtp_mask(WINDOW, 1, 6, EOS), expected)


def test_an_end_that_is_itself_the_target_is_learnt():
    assert mtp_mask(torch.tensor([[10, 11, EOS, 20]]), 0, 1, EOS).item()


@pytest.mark.parametrize("depth", [0, 1])
def test_loss_is_the_mean_over_unmasked_positions_of_the_shifted_target(depth):
    depths = 2
    model, window = tiny_model(num_nextn_predict_layers=depths), windows(3, 16 + 1 + depths)
    losses = compute_losses(model, window, count_targets(window, depths, EOS), EOS)
    hidden = model.backbone(window[:, :16]).hidden_BTD
    for k in range(depth + 1):
        hidden = model.mtp_step(k, hidden, window[:, 1 + k : 17 + k]).hidden_BTD
    logits, total, count = model.head(hidden), 0.0, 0
    for b in range(3):
        for i in range(16):
            if EOS in window[b, i + 1 : i + 2 + depth].tolist():
                continue
            total += float(F.cross_entropy(logits[b, i], window[b, i + 2 + depth]).detach())
            count += 1
    assert 0 < count < 48
    torch.testing.assert_close(losses.mtp[depth], torch.tensor(total / count), rtol=1e-5, atol=1e-5)


def test_no_unmasked_target_gives_a_zero_loss_not_nan():
    model, window = tiny_model(), torch.full((1, 18), EOS)
    losses = compute_losses(model, window, count_targets(window, 1, EOS), EOS)
    assert float(losses.mtp[0].detach()) == 0.0
