"""Trap 13: gradients, their norm and the counts for the bias do not depend on how many ranks share a step.

The parts: shares cut by `rank_slice`, losses divided by the whole step's counts, counts summed by `reduce_counts`.
Whole runs, with expert parallelism and sharded parameters: tests/distributed.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from soli.train.balance import reduce_counts, step_bias
from soli.train.batches import Batches, PackedTokens, rank_slice
from soli.train.losses import compute_losses, count_targets
from tests.train.toy import EOS, tiny_model, write_data

STEP = 7  # windows: no world size divides it


def share_of_step(data: Path, rank: int, world: int):
    """A model with the gradients of one rank's share of a step, and its counts."""
    batches, model = Batches(PackedTokens(data, "train"), 16, 2, seed=3), tiny_model()
    totals = count_targets(batches.take(10, STEP), 1, EOS)
    losses = compute_losses(model, batches.take(*rank_slice(10, STEP, rank, world)), totals, EOS)
    losses.total(0.3, 1e-4).backward()
    return model, losses.counts_LE


def work(rank: int, world: int, folder: Path) -> None:
    """One process of `world`: its share, summed over all ranks; every rank saves its results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    model, counts_LE = share_of_step(folder / "data", rank, world)
    for p in model.parameters():
        dist.all_reduce(p.grad)
    counts_LE = reduce_counts(counts_LE)
    step_bias(model, counts_LE, 0.01)
    results = {name: p.grad for name, p in model.named_parameters()} | {"counts": counts_LE}
    results |= {name: layer.gate.e_score_correction_bias for name, layer in model.moe_layers()}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def assert_same(model, counts_LE, results: dict[str, torch.Tensor]) -> None:
    assert torch.equal(counts_LE, results["counts"])
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(results[name], gradient, rtol=1e-4, atol=1e-6)
    norm = torch.nn.utils.get_total_norm([results[name] for name in expected])
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(expected.values()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_any_number_of_ranks_add_up_to_the_step(tmp_path, world):
    data = write_data(tmp_path / "data")
    whole, counts_LE = share_of_step(data, 0, 1)
    shares = [share_of_step(data, rank, world) for rank in range(world)]
    gradients = {name: sum(m.get_parameter(name).grad for m, _ in shares) for name, _ in whole.named_parameters()}
    assert_same(whole, counts_LE, gradients | {"counts": sum(counts for _, counts in shares)})


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    data = write_data(tmp_path / "data")
    processes.start_processes(work, (2, tmp_path), nprocs=2, start_method="spawn")
    whole, counts_LE = share_of_step(data, 0, 1)
    step_bias(whole, counts_LE, 0.01)
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert_same(whole, counts_LE, results)
        for name, layer in whole.moe_layers():
            assert torch.equal(layer.gate.e_score_correction_bias, results[name]) and results[name].any()
