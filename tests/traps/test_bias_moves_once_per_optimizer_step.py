"""Trap 5: the bias moves once per optimizer step, from the counts of all micro-batches, only in training, in MTP layers
too; recomputed activations are not counted again.
"""

import torch
from torch.utils.checkpoint import checkpoint

from soli.train.losses import compute_losses, count_targets
from soli.train.report import RunReport
from soli.train.setup import prepare
from soli.train.trainer import measure, take_step
from tests.train.toy import EOS, settings, tiny_model, windows, write_data


def biases(model):
    return [layer.gate.e_score_correction_bias.clone() for _, layer in model.moe_layers()]


def test_one_step_moves_every_layer_by_gamma_whatever_the_micro_batch(tmp_path):
    data, biases_by_run = write_data(tmp_path / "data"), []
    for micro in (8, 2):
        run = prepare(settings(run={"micro_sequences": micro}), {}, data, tmp_path / f"run{micro}")
        step = take_step(run)
        assert int(step.counts_LE.sum()) == 2 * 2 * 8 * 16  # layers (one of them MTP) x chosen x sequences x tokens
        biases_by_run.append(biases(run.model))
        for bias_E, counts_E in zip(biases_by_run[-1], step.counts_LE, strict=True):
            assert torch.equal(bias_E, 0.01 * torch.sign(counts_E.float().mean() - counts_E))
    assert all(torch.equal(a, b) for a, b in zip(*biases_by_run, strict=True))
    assert all(bias.any() for bias in biases_by_run[0])


def test_counters_are_zeroed_each_step(tmp_path):
    run = prepare(settings(), {}, write_data(tmp_path / "data"), tmp_path / "run")
    assert take_step(run).counts_LE.sum() == take_step(run).counts_LE.sum()


def test_evaluation_moves_no_bias(tmp_path):
    run = prepare(settings(), {}, write_data(tmp_path / "data"), tmp_path / "run")
    take_step(run)
    before = biases(run.model)
    with RunReport(run.folder, 100, run.progress) as report:
        measure(run, report)
    assert all(torch.equal(a, b) for a, b in zip(before, biases(run.model), strict=True))


def test_recomputed_activations_count_once():
    model, window = tiny_model(), windows(4, 18)
    totals = count_targets(window, 1, EOS)
    plain = compute_losses(model, window, totals, EOS)
    plain.total(0.3, 1e-4).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for block in (*model.layers, *(module.block for module in model.mtp)):
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    recomputed = compute_losses(model, window, totals, EOS)
    recomputed.total(0.3, 1e-4).backward()
    assert torch.equal(recomputed.counts_LE, plain.counts_LE)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
