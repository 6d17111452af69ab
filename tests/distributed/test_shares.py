"""What ranks read and save: each window once, uneven shares, experts without tokens, checkpoints for any number."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import soli
from soli.parallel.mesh import build_meshes
from soli.parallel.ranks import join_ranks, launched_ranks
from soli.parallel.sharding import register_outputs, shard_model
from soli.train.balance import reduce_counts
from soli.train.batches import Batches
from soli.train.checkpoint_saver import CheckpointSaver
from soli.train.checkpoints import export_run, load_run, run_state
from soli.train.losses import compute_losses, count_targets
from soli.train.setup import prepare
from soli.train.trainer import take_step
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Trained, saved_state, train_steps
from tests.train.toy import EOS, settings, tiny_model, windows

RAMP = {  # batches of 4, 5, 6, 7, 8 sequences: of two ranks one often has a sequence more
    "schedule": {"batch_sequences_start": 4, "batch_sequences": 8, "batch_ramp_tokens": 16 * 22},
    "optimizer": {"clip": 1e9},
}


def read_and_train(data: Path, folder: Path, sections: dict) -> tuple[list[torch.Tensor], Trained]:
    """The windows of each step, and what training on them gave."""
    steps: list[torch.Tensor] = []
    take = Batches.take

    def record(batches: Batches, position: int, count: int) -> torch.Tensor:
        window_BW = take(batches, position, count)
        steps.append(window_BW)
        return window_BW

    Batches.take = record
    try:
        return steps, train_steps(data, folder, 8, sections)
    finally:
        Batches.take = take


def test_ranks_read_one_process_windows_in_order_also_in_a_batch_ramp(tmp_path, data):
    """A micro-batch of one sequence, so that the rank with fewer computes an empty one."""
    sections = RAMP | {"run": {"micro_sequences": 1}}
    one_windows, one = read_and_train(data, tmp_path / "one", sections)
    parallel = sections | {"parallel": {"data": 1, "expert": 2}}
    ranks = run_ranks(read_and_train, 2, tmp_path / "ranks", data, tmp_path / "many", parallel)
    shares = [windows_of_rank for windows_of_rank, _ in ranks]
    assert {len(first) - len(second) for first, second in zip(*shares, strict=True)} == {0, -1}
    for whole, *parts in zip(one_windows, *shares, strict=True):
        assert torch.equal(torch.cat(parts), whole)
    for _, many in ranks:
        assert many.losses == [pytest.approx(losses, rel=1e-5) for losses in one.losses]
        assert all(torch.equal(a, b) for a, b in zip(many.counts, one.counts, strict=True))
        assert one.distance(many) < 1e-4


def gradients_without_tokens() -> dict[str, torch.Tensor]:
    """Gradients and counts where every token selects experts 0 to 3, which the first rank has."""
    model = tiny_model()
    for _, mixture in model.moe_layers():
        mixture.gate.e_score_correction_bias.copy_(torch.tensor([9.0] * 4 + [0.0] * 4))
    ids_BW = windows(8, 18)
    ranks = launched_ranks()
    totals = count_targets(ids_BW, 1, EOS)
    if ranks.world > 1:
        join_ranks(ranks, torch.device("cpu"))
        shard_model(model, build_meshes(1, ranks.world, 1, "cpu"))
        ids_BW = ids_BW.chunk(ranks.world)[ranks.rank]
    losses = compute_losses(model, ids_BW, totals, EOS)
    losses.total(0.3, 1e-4).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return whole | {"counts": reduce_counts(losses.counts_LE)}


def test_a_rank_whose_experts_get_no_token_has_zero_gradients(tmp_path):
    one = gradients_without_tokens()
    assert not one["counts"][:, 4:].any()
    for many in run_ranks(gradients_without_tokens, 2, tmp_path):
        assert torch.equal(many["counts"], one["counts"])
        assert not many["layers.1.mlp.experts.gate_up_proj"][4:].any()
        for name, gradient in one.items():
            torch.testing.assert_close(many[name], gradient, rtol=1e-4, atol=1e-7)


def test_fsdp_finds_every_tensor_that_a_forward_pass_returns():
    """Of any torch: those that it does not find are computed backward with freed parameters."""
    register_outputs()
    outputs = []
    model = tiny_model()
    for module in (*model.layers, *model.mtp):
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    ids_BT = windows(2, 18)
    output = model.backbone(ids_BT)
    outputs += [output, model.mtp_step(0, output.hidden_BTD, ids_BT)]
    for output in outputs:
        assert {id(leaf) for leaf in tree_leaves(output)} >= {id(t) for t in collect_tensors(output)} != set()


def collect_tensors(value: object) -> Iterator[torch.Tensor]:
    """Those of tuples and dataclasses that have a gradient."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from collect_tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from collect_tensors(getattr(value, field.name))


def load_and_save(data: Path, source: Path, sections: dict) -> dict[str, torch.Tensor]:
    """Resume `source`, and save what was loaded beside a step more in another run."""
    run = prepare(settings(**sections), {}, data, source)
    loaded = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in run_state(run.model, run.optimizer).items()
        if "rng" not in name
    }
    take_step(run)
    with CheckpointSaver(source, keep=9) as saver:
        saver.save(run.model, run.optimizer, run.progress)
    return loaded


@pytest.mark.parametrize(
    "sizes",
    [[(1, 1), (1, 2)], pytest.param([(2, 2), (1, 4), (2, 1), (4, 1), (2, 2)], marks=pytest.mark.slow)],
)
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path, data, sizes):
    """Each session resumes what the one before saved, with other sizes, and trains a step; then it is exported."""
    run = tmp_path / "run"
    for number, (data_ranks, expert) in enumerate(sizes):
        sections = {"parallel": {"data": data_ranks, "expert": expert}, "optimizer": {"name": "muon"}}
        world = data_ranks * expert
        before = saved_state(run) if number else None
        arguments = data, run, sections
        for loaded in run_ranks(load_and_save, world, tmp_path / "ranks", *arguments):
            if before is not None:
                assert loaded.keys() == before.keys()
                assert [name for name in before if not torch.equal(before[name], loaded[name])] == []
    export_run(run, tmp_path / "model", "fp32")
    exported = soli.load_model(tmp_path / "model", dtype=torch.float32, mtp=True).state_dict()
    expected = load_run(run).state_dict()
    assert exported.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], exported[name])] == []
