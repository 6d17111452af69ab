"""Training steps on several ranks beside one process at equal work: bytes that a rank sends, processor time per step.

gloo on this machine's CPU, every rank one thread of it: evidence that the same work is done and of what is sent, not of
speed, which a CPU's loopback says little about. Time is the processor time of all ranks together, so 1.0 would be
communication for nothing. Losses of the steps must agree with one process's, and the bytes are set beside those that
`soli train --dry-run` plans for the mesh.

    python benchmarks/distributed.py
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from soli.config import preset, replace
from soli.plan.device_load import DeviceLoad
from soli.plan.mesh_sizes import MeshSizes
from soli.train.losses import compute_losses, count_targets
from soli.train.optimizer import Optimizer
from soli.train.settings import OptimizerSettings, read_settings

LENGTH, SEQUENCES, RATE, NO_EOS = 128, 16, 1e-3, -1
MESHES = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]  # data, expert
SHAPE = {"num_hidden_layers": 4, "num_nextn_predict_layers": 0, "vocab_size": 1024}


class SentBytes:
    """Bytes that this rank sends to others in torch.distributed's collectives."""

    NAMES = ("all_gather_single", "all_gather_into_tensor", "all_gather", "all_to_all_single")

    def __init__(self) -> None:
        self.bytes = 0
        for name in self.NAMES:
            if hasattr(dist, name):
                setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, collective: Any) -> Any:
        def call(output: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group") or dist.group.WORLD
            ranks = group.size()
            size = tensor.numel() * tensor.element_size()
            self.bytes += size * (ranks - 1) // (ranks if name == "all_to_all_single" else 1)
            return collective(output, tensor, *args, **kwargs)

        return call


def windows(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(2, 1024, (SEQUENCES, LENGTH + 1), generator=generator)


def measure(rank: int, data: int, expert: int, port: int, steps: int, folder: Path) -> None:
    """One rank's steps: writes losses, processor seconds and bytes sent, all of one step but the first."""
    from soli.model.transformer import Transformer
    from soli.parallel.mesh import build_meshes
    from soli.parallel.ranks import Ranks
    from soli.parallel.sharding import init_shards, shard_model

    torch.set_num_threads(1)
    world = data * expert
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = Ranks(rank, world)
    config = replace(preset("nano"), SHAPE)
    model = Transformer(config, device="meta" if world > 1 else "cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    if world > 1:
        dist.init_process_group("gloo")
        counter = SentBytes()
        shard_model(model, build_meshes(data, expert, 1, "cpu"))
        init_shards(model, torch.device("cpu"), generator)
    else:
        counter = SentBytes()
        model.init_weights(generator)
    optimizer = Optimizer(model, OptimizerSettings(), torch.float32, ranks)
    losses: list[float] = []
    for step in range(steps + 1):
        if step == 1:
            counter.bytes = 0
            start = time.process_time()
        part_BW = windows(step).chunk(world)[rank]
        parts = compute_losses(model, part_BW, count_targets(part_BW, 0, NO_EOS, ranks), NO_EOS)
        parts.total(0.0, 1e-4).backward()
        losses.append(float(ranks.sum(parts.parts())[0]))
        optimizer.step(RATE)
    result = {"losses": losses, "seconds": (time.process_time() - start) / steps, "bytes": counter.bytes / steps}
    torch.save(result, folder / f"{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def planned_bytes(data: int, expert: int) -> int:
    """Bytes that a rank sends in a step, as soli.plan has them."""
    schedule = {"sequence_length": LENGTH, "batch_sequences": SEQUENCES, "constant_tokens": 10**6}
    run = {"micro_sequences": SEQUENCES // (data * expert), "precision": "fp32"}
    model = {"preset": "nano", **SHAPE}
    settings = read_settings({"model": model, "schedule": schedule, "run": run})
    return sum(DeviceLoad(settings, MeshSizes(data, expert), "fp32").traffic().values())


def run(data: int, expert: int, steps: int) -> list[dict[str, Any]]:
    """Results of all ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        world = data * expert
        processes.start_processes(measure, (data, expert, port, steps, Path(name)), nprocs=world, start_method="spawn")
        return [torch.load(Path(name) / f"{rank}.pt") for rank in range(world)]


def main() -> None:
    options = record.parser(__doc__, rounds=3)
    options.add_argument("--steps", type=int, default=3, help="steps of a round (default 3)")
    arguments = options.parse_args()
    seconds: dict[tuple[int, int], list[float]] = {mesh: [] for mesh in [(1, 1), *MESHES]}
    traffic: dict[tuple[int, int], float] = {}
    expected: list[float] = []
    for _ in range(arguments.rounds):
        for mesh, times in seconds.items():
            results = run(*mesh, arguments.steps)
            times.append(sum(result["seconds"] for result in results))
            traffic[mesh] = max(result["bytes"] for result in results)
            expected = expected or results[0]["losses"]
            torch.testing.assert_close(results[0]["losses"], expected, rtol=1e-5, atol=0)
            record.progress(f"data {mesh[0]} x expert {mesh[1]}: {times[-1]:.2f} s, {traffic[mesh] / 1e6:.1f} MB")
    one = seconds.pop((1, 1))
    size = {"model": "nano's shape, 4 layers, vocabulary 1,024", "sequences": SEQUENCES, "length": LENGTH}
    rows = [
        {
            "what": f"a step, data {data} x expert {expert}: processor time of all ranks",
            "unit": "s",
            "soli": record.spread(times),
            "peers": {"one process": record.spread(one)},
            "bytes_sent_per_rank": round(traffic[data, expert]),
            "bytes_planned": planned_bytes(data, expert),
        }
        for (data, expert), times in seconds.items()
    ]
    note = "gloo on one machine: evidence of equal work and of bytes, not of speed. " + record.NOTE
    record.write("distributed", {"hardware": record.hardware(), "note": note, "size": size, "rows": rows})


if __name__ == "__main__":
    main()
