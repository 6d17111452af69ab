"""Trap 8: cutting an optimizer step into micro-batches of another size leaves its gradients and losses equal."""

import pytest
import torch

from soli.train.losses import compute_losses, count_targets
from tests.train.toy import EOS, tiny_model, windows


def gradients(micro: int, depths: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    model = tiny_model(num_nextn_predict_layers=depths)
    window = windows(8, 17 + depths)
    totals, reported = count_targets(window, depths, EOS), torch.zeros(3)
    for part in window.split(micro):
        losses = compute_losses(model, part, totals, EOS)
        losses.total(0.3, 0.1).backward()
        reported += torch.stack((losses.next_token, torch.stack(losses.mtp).mean(), losses.balance)).detach()
    return {name: p.grad for name, p in model.named_parameters()}, reported


@pytest.mark.parametrize("depths", [1, 2])
def test_micro_batch_size_leaves_gradients_equal(depths):
    whole, whole_losses = gradients(8, depths)
    for micro in (1, 3):  # 3 leaves a smaller last one, and every part has its own number of masked targets
        cut, cut_losses = gradients(micro, depths)
        torch.testing.assert_close(cut_losses, whole_losses)
        for name, gradient in whole.items():
            torch.testing.assert_close(
                cut[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_micro_batches_really_differ_in_masked_targets():
    counts = {count_targets(part, 1, EOS).mtp_tokens for part in windows(8, 18).split(1)}
    assert len(counts) > 1
