"""Training steps on two GPUs over NCCL beside one GPU at equal work: equal numbers, bytes sent, time per step.

The shape of src/soli/recipes/one-gpu. In float32 the losses and gradient norms of five steps must agree with one GPU's
to 1e-4 (NCCL adds in its own order); times are those in bf16. With fewer than two GPUs it ends with a sentence.

    python benchmarks/gpu/two_gpus.py
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import chip
import torch
import torch.multiprocessing as processes
from distributed import NO_EOS, RATE, SentBytes, free_port, set_ranks

from soli.analysis.parameters import count, flops
from soli.config import ModelConfig, preset, replace
from soli.data.recipe import find_recipe, load_recipe
from soli.train.losses import compute_losses, count_targets
from soli.train.optimizer import Optimizer
from soli.train.settings import OptimizerSettings, read_settings

MESHES = [(1, 1), (2, 1), (1, 2)]  # data, expert
CHECKED, TOLERANCE = 5, 1e-4  # steps in float32, relative difference of loss and norm


def shape(tiny: bool) -> ModelConfig:
    if tiny:
        return replace(preset("nano"), {"num_nextn_predict_layers": 0, "num_hidden_layers": 2})
    return replace(read_settings(load_recipe(find_recipe("one-gpu"), [])).model, {"num_nextn_predict_layers": 0})


def measure(rank: int, mesh: tuple[int, int], port: int, tiny: bool, steps: int, folder: Path) -> None:
    """One rank: losses and norms of steps in float32, then seconds and bytes sent of a step in bf16."""
    from soli.model.transformer import Transformer
    from soli.parallel.mesh import build_meshes
    from soli.parallel.ranks import ALONE, Ranks, join_ranks
    from soli.parallel.sharding import init_shards, shard_model

    data, expert = mesh
    world = data * expert
    set_ranks(rank, world, port)
    ranks = Ranks(rank, world, rank, world) if world > 1 else ALONE
    device = torch.device("cpu" if tiny else f"cuda:{rank}")
    join_ranks(ranks, device)
    counter, config = SentBytes(), shape(tiny)
    sequences, length = (4, 32) if tiny else (16, 1024)
    model = Transformer(config, device="meta", dtype=torch.float32)
    if world > 1:
        shard_model(model, build_meshes(data, expert, 1, device.type))
    init_shards(model, device, torch.Generator(device).manual_seed(0))
    optimizer = Optimizer(model, OptimizerSettings(), torch.float32, ranks)

    def step(number: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(number)
        batch_BW = torch.randint(3, config.vocab_size, (sequences, length + 1), generator=generator)
        part_BW = batch_BW.chunk(world)[rank].to(device)
        losses = compute_losses(model, part_BW, count_targets(part_BW, 0, NO_EOS, ranks), NO_EOS)
        losses.total(0.0, 1e-4).backward()
        loss = float(ranks.sum(losses.parts())[0])
        return loss, optimizer.step(RATE)

    checked = [step(number) for number in range(CHECKED)]
    model.compute_dtype = torch.bfloat16
    step(CHECKED)
    numbers, counter.bytes = iter(range(CHECKED + 1, CHECKED + steps + 9)), 0
    seconds = chip.seconds(lambda: step(next(numbers)), steps)
    result = {"checked": checked, "seconds": seconds, "bytes": counter.bytes / (steps + 1)}
    torch.save(result, folder / f"{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def run(mesh: tuple[int, int], tiny: bool, steps: int) -> list[dict[str, Any]]:
    """Results of all ranks of a mesh."""
    world = mesh[0] * mesh[1]
    with tempfile.TemporaryDirectory() as name:
        arguments = (mesh, free_port(), tiny, steps, Path(name))
        processes.start_processes(measure, arguments, nprocs=world, start_method="spawn")
        return [torch.load(Path(name) / f"{rank}.pt") for rank in range(world)]


def row(mesh: tuple[int, int], tiny: bool, one: list[dict[str, Any]]) -> dict[str, Any]:
    """A mesh's figures, and its distance from one GPU; the first mesh is that GPU."""
    results = run(mesh, tiny, 2 if tiny else 20)
    one.extend([] if one else results)
    pairs = zip(results[0]["checked"], one[0]["checked"], strict=True)
    distance = max(abs(a - b) / abs(b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    if distance > TOLERANCE:
        raise ValueError(f"losses or norms differ from one GPU's by {distance:.1e}, more than {TOLERANCE:.0e}")
    seconds = statistics.median(result["seconds"] for result in results)
    return {
        "ms": 1e3 * seconds,
        "largest_difference": distance,
        "bytes_sent_per_rank": max(result["bytes"] for result in results),
        "speedup": one[0]["seconds"] / seconds,
    }


def main() -> None:
    arguments = chip.parser(__doc__).parse_args()
    tiny, gpus = arguments.tiny, torch.cuda.device_count()
    if gpus < 2 and not tiny:
        sys.exit(f"this compares two GPUs with one, and there are {gpus}; --tiny runs it on a CPU and records nothing")
    one: list[dict[str, Any]] = []
    rows = [
        chip.attempt(f"data {mesh[0]} x expert {mesh[1]}", lambda mesh=mesh: row(mesh, tiny, one)) for mesh in MESHES
    ]
    config = shape(tiny)
    size = {"parameters": count(config).total, "forward_flops_per_token": flops(config, 1024).prefill}
    chip.finish("two_gpus", arguments, {"size": size, "rows": rows})


if __name__ == "__main__":
    main()
