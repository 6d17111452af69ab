"""A training step in bf16 stays on its device: it reads no value back, and creates no tensor elsewhere.

The meta device stands in for a GPU: a tensor there has no values to read, and does not mix with those of a CPU.
"""

import torch

from soli.config import preset
from soli.kernels import count_tokens
from soli.model import Transformer
from soli.train.losses import compute_losses, count_targets


def test_forward_and_backward_read_nothing_back() -> None:
    config = preset("nano")
    totals = count_targets(torch.arange(2 * 34).view(2, 34), config.num_nextn_predict_layers, eos_id=1)
    model = Transformer(config, device="meta", dtype=torch.float32)
    model.compute_dtype = torch.bfloat16
    losses = compute_losses(model, torch.empty(2, 34, dtype=torch.int64, device="meta"), totals, eos_id=1)
    losses.total(0.3, 1e-4).backward()
    assert losses.counts_LE.is_meta
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in model.parameters())


def test_tokens_are_counted_for_experts_with_none_as_well() -> None:
    ids_TK = torch.tensor([[0, 3], [3, 1], [3, 0]])
    assert count_tokens(ids_TK, 6).tolist() == [2, 1, 0, 3, 0, 0]
    assert count_tokens(ids_TK[:0], 6).tolist() == [0] * 6
