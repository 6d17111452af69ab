"""Communication of one layer of a model that several ranks share: two ordered sums, or dispatch to experts and back.

Sums are what tensor-parallel attention needs (`soli serve --processes`); dispatch is what data-parallel attention would
need, each rank with its share of the tokens. DeepSeek-V3's sizes in bfloat16, gloo on this machine's loopback, one
thread for each rank: which of the two is cheaper, not what a network would take. Both take turns.

    python benchmarks/layer_communication.py
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from distributed import free_port, set_ranks
from torch import Tensor

from soli.parallel.dispatch import compute_experts
from soli.parallel.tensor_parallel import Sums

D, K, E = 7168, 8, 256
TOKENS = (16, 64, 256)  # of a step, all ranks together
REPEATS = 13  # of each round, the first three for warming up


class NoProducts:
    """An expert backend that returns its rows: communication alone is measured."""

    def experts(self, x_TD: Tensor, *_: Tensor) -> Tensor:
        return x_TD


def measure(rank: int, world: int, port: int, file: Path) -> None:
    """One rank of a round; the first writes the medians in milliseconds, by tokens and way."""
    set_ranks(rank, world, port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(rank)
    sums, own_experts = Sums(world), torch.empty(E // world, 0)
    medians: dict[tuple[int, str], float] = {}
    with torch.inference_mode():
        for tokens in (world, *TOKENS):
            partial_TD = torch.randn(tokens, D, dtype=torch.bfloat16)
            own_TD = partial_TD[: tokens // world]
            ids_TK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in own_TD])
            weights_TK = torch.rand(ids_TK.shape)

            def add(partial_TD: Tensor = partial_TD) -> None:
                sums.total(partial_TD)
                sums.total(partial_TD)

            def dispatch(own_TD: Tensor = own_TD, ids_TK: Tensor = ids_TK, weights_TK: Tensor = weights_TK) -> None:
                compute_experts(NoProducts(), dist.group.WORLD, own_TD, ids_TK, weights_TK, own_experts, own_experts)  # type: ignore[arg-type]

            times: dict[str, list[float]] = {"sums": [], "dispatch": []}
            for _ in range(REPEATS):
                for name, call in (("sums", add), ("dispatch", dispatch)):
                    dist.barrier()
                    start = time.perf_counter()
                    call()
                    dist.barrier()
                    times[name].append(time.perf_counter() - start)
            for name, values in times.items():
                medians[tokens, name] = 1e3 * sorted(values[3:])[len(values[3:]) // 2]
    if rank == 0:
        torch.save(medians, file)
    dist.destroy_process_group()


def one_round(world: int) -> dict[tuple[int, str], float]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "medians.pt"
        processes.spawn(measure, (world, free_port(), file), world)  # type: ignore[no-untyped-call]
        return dict(torch.load(file, weights_only=True))


def main() -> None:
    arguments = record.parser(__doc__, rounds=3).parse_args()
    rows = []
    for world in (2, 4):
        rounds = [one_round(world) for _ in range(arguments.rounds)]
        for tokens in (world, *TOKENS):
            values = {name: [one[tokens, name] for one in rounds] for name in ("sums", "dispatch")}
            what = f"{world} ranks, {tokens} tokens a step"
            rows.append(record.row(what, "ms", values["sums"], {"dispatch": values["dispatch"]}))
    record.finish("layer_communication", {"hidden": D, "experts": E, "selected": K, "threads": os.cpu_count()}, rows)


if __name__ == "__main__":
    main()
