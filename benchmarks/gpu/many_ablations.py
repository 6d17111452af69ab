"""The small ablations with more seeds and more tokens: many runs side by side on one GPU, stopped in time, resumable.

Arms and figures are those of benchmarks/ablations; one run is far too small for a GPU, so --workers of them share it.
Finished runs go line by line into gpu_ablations.jsonl in --out; the same command with that file in place continues.

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
    metrics = small.train_arm(arm_settings(name, tokens, seed), data)
    return {"arm": name, "seed": seed, "budget": tokens, "commit": record.hardware()["commit"], **metrics}


def main() -> None:
    parser = chip.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of packed tokens")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4_096_000, help="of the baseline (default 4,096,000)")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no run after these")
    arguments = parser.parse_args()
    chip.require_gpu(arguments.tiny)
    file = (arguments.out or record.RESULTS) / "gpu_ablations.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    names = small.selected_arms(sorted(EXPERIMENTS))
    seeds, tokens, minutes = arguments.seeds, arguments.tokens, arguments.minutes
    if arguments.tiny:
        names, seeds, tokens, minutes = list(ARMS)[:1], 1, 4096, 1.0
    todo = list(small.missing(file, names, seeds, tokens))
    end = time.monotonic() + 60 * minutes
    workers = 1 if arguments.tiny else arguments.workers
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(one, *todo.pop(0), tokens, arguments.data) for _ in range(min(workers, len(todo)))}
        while running:
            completed, running = wait(running, return_when=FIRST_COMPLETED)
            for future in completed:
                small.add_line(file, future.result())
                if todo and time.monotonic() < end:
                    running.add(pool.submit(one, *todo.pop(0), tokens, arguments.data))
    summary = {"finished": len(small.read_lines(file)), "left": len(todo), "seeds": seeds, "tokens": tokens}
    chip.finish("ablations", arguments, summary)


if __name__ == "__main__":
    main()
