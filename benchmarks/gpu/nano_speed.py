"""Tokens per second of nano's training step, by batch, with and without a CUDA graph and compiled blocks.

A step is soli.train.trainer's own, with optimizer and bias step. Nano's layers are so small that a GPU mostly
waits for launches: what a graph and a larger batch bring is what this measures. All rows begin with the same weights
and read the same windows, so rows of one batch should end with nearly the same loss.

    python benchmarks/gpu/nano_speed.py .carry/nano.tar.xz
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import chip
import torch
import train_nano

from soli.analysis.parameters import training_flops
from soli.data.recipe import find_recipe, load_recipe
from soli.train.settings import read_settings
from soli.train.setup import prepare
from soli.train.trainer import take_step

RUN_IN, STEPS = 10, 30


def measure(data: Path, sequences: int, switches: list[str], tiny: bool) -> dict[str, Any]:
    """The median step of one setting, and the loss after all of them."""
    changes: dict[str, object] = {"run.cuda_graph": "false"} | {f"run.{switch}": "true" for switch in switches}
    changes |= {"schedule.batch_sequences": sequences, "run.micro_sequences": sequences}
    if tiny:
        changes |= train_nano.TINY
    overrides = [f"{key}={value}" for key, value in changes.items()]
    settings = read_settings(load_recipe(find_recipe(train_nano.RECIPE), overrides))
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(settings, {}, data, Path(folder) / "run")
    began = time.monotonic()
    for _ in range(2 if tiny else RUN_IN):
        take_step(run)
    started = time.monotonic() - began
    loss = 0.0

    def step() -> None:
        nonlocal loss
        loss = take_step(run).loss

    seconds = chip.seconds(step, 2 if tiny else STEPS)
    tokens = settings.schedule.batch_sequences * settings.schedule.sequence_length
    flops = training_flops(settings.model, settings.schedule.sequence_length)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"ms": seconds * 1e3, "tokens_s": tokens / seconds, "tflops": tokens * flops / seconds / 1e12, "loss": loss,
            "first_steps_s": started, "peak_gib": peak}  # fmt: skip


def main() -> None:
    parser = chip.parser(__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "soli-nano")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    chip.require_gpu(arguments.tiny)
    arguments.work.mkdir(parents=True, exist_ok=True)
    train_nano.unpack(arguments.archive, arguments.work / "data")
    settings: list[tuple[int, list[str]]] = [(batch, []) for batch in (32, 64, 128, 256)]
    settings += [(batch, ["cuda_graph"]) for batch in (32, 64, 128, 256)]
    settings += [(64, ["compile"]), (64, ["compile", "cuda_graph"]), (128, ["compile", "cuda_graph"])]
    rows = []
    for sequences, switches in settings[:2] if arguments.tiny else settings:
        what = ", ".join((f"{sequences} sequences of 256", *(switch.replace("_", " ") for switch in switches)))
        if arguments.only not in what:
            continue
        row = chip.attempt(what, lambda b=sequences, s=switches: measure(arguments.work / "data", b, s, arguments.tiny))
        chip.record.progress(str(row))
        rows.append(row)
    chip.finish("nano_speed", arguments, {"rows": rows})


if __name__ == "__main__":
    main()
