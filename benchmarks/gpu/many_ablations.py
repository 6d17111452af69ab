"""The small ablations with more seeds and more tokens: many runs side by side on one GPU, stopped in time, resumable.

Arms and figures are those of benchmarks/ablations; one run is far too small for a GPU, so --workers of them share it.
Finished runs go line by line into gpu_ablations.jsonl in --out; the same command with that file in place goes on.

    python benchmarks/gpu/many_ablations.py --data /tmp/soli-nano/data --minutes 8 --out $OUT
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import chip
import record
from ablations import run as small
from ablations.arms import ARMS, EXPERIMENTS, arm_settings


def one(name: str, seed: int, tokens: int, data: Path) -> dict[str, Any]:
    """One finished run's line, made in a process of its own."""
    import torch

    torch.set_num_threads(1)
    found = small.train_arm(arm_settings(name, tokens, seed), data)
    return {"arm": name, "seed": seed, "budget": tokens, "commit": record.hardware()["commit"], **found}


def main() -> None:
    made = chip.parser(__doc__)
    made.add_argument("--data", type=Path, required=True, help="the folder of packed tokens")
    made.add_argument("--seeds", type=int, default=8)
    made.add_argument("--tokens", type=int, default=4_096_000, help="of the baseline (default 4,096,000)")
    made.add_argument("--workers", type=int, default=12)
    made.add_argument("--minutes", type=float, default=8.0, help="begin no run after these")
    given = made.parse_args()
    chip.require_gpu(given.tiny)
    file = (given.out or record.RESULTS) / "gpu_ablations.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    names, seeds, tokens, end = small.chosen_arms(sorted(EXPERIMENTS)), given.seeds, given.tokens, given.minutes * 60
    if given.tiny:
        names, seeds, tokens, end = list(ARMS)[:1], 1, 4096, 60.0
    todo, end = list(small.missing(file, names, seeds, tokens)), time.monotonic() + end
    workers = 1 if given.tiny else given.workers
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(one, *todo.pop(0), tokens, given.data) for _ in range(min(workers, len(todo)))}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for finished in done:
                small.add_line(file, finished.result())
                if todo and time.monotonic() < end:
                    running.add(pool.submit(one, *todo.pop(0), tokens, given.data))
    found = {"finished": len(small.read_lines(file)), "left": len(todo), "seeds": seeds, "tokens": tokens}
    chip.finish("ablations", given, found)


if __name__ == "__main__":
    main()
