"""A state saved by two processes, a shard each, is read by one, and vice versa."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from soli.train.checkpoint_saver import CheckpointSaver
from soli.train.checkpoints import load_checkpoint, run_state
from soli.train.optimizer import Optimizer
from soli.train.run_folder import RunProgress, checkpoints
from soli.train.settings import OptimizerSettings
from tests.train.toy import tiny_model

SERVER = multiprocessing.get_context("forkserver")


def stepped(seed: int, sharded: bool = False) -> tuple:
    """A model and its optimizer after a step; `sharded`: every parameter cut in two along its first dimension."""
    model = tiny_model(seed)
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    optimizer = Optimizer(model, OptimizerSettings(), torch.float32)
    for p in model.parameters():
        grad = torch.sin(torch.arange(p.numel(), dtype=torch.float32)).view(p.shape)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if sharded else grad
    optimizer.step(0.0, norm=torch.tensor(0.5))  # below the clip norm
    return model, optimizer


def whole(model, optimizer) -> dict[str, torch.Tensor]:
    state = run_state(model, optimizer)
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items() if "rng" not in k}


def save_and_load(rank: int, folder: Path) -> None:
    """One of two processes: saves its shards, then reads what a single process saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, optimizer = stepped(0, sharded=True)
    assert isinstance(model.lm_head.weight, DTensor)
    with CheckpointSaver(folder / "two", keep=1) as saver:
        saver.save(model, optimizer, RunProgress(step=1))
    other, moments = stepped(1, sharded=True)
    assert load_checkpoint(checkpoints(folder / "one")[-1], other, moments).step == 7
    one, two = whole(model, optimizer), whole(other, moments)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_write_what_one_reads_and_vice_versa(tmp_path):
    SERVER.set_forkserver_preload(["soli.train.trainer", "tests.train.toy"])
    model, optimizer = stepped(0)
    with CheckpointSaver(tmp_path / "one", keep=1) as saver:
        saver.save(model, optimizer, RunProgress(step=7))
    processes = [SERVER.Process(target=save_and_load, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    last = checkpoints(tmp_path / "two")[-1]
    assert len(list(last.glob("*.safetensors"))) == 4
    other, moments = stepped(1)
    assert load_checkpoint(last, other, moments).step == 1
    one, two = whole(model, optimizer), whole(other, moments)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
