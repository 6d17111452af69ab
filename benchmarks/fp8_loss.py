"""What FP8 training costs in loss: the recipe nano-zh-en in bf16 and in emulated FP8, same start, same windows.

The paper reports a relative difference below 0.25 % (section 3.3, models of 16 B and 230 B over a trillion tokens or
more). Here the model is nano and the run is short; optimizer, rates and losses are the recipe's, the batch is smaller.
Needs the recipe's data (soli data build nano-zh-en).

    python benchmarks/fp8_loss.py --steps 200
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
import torch

from soli.data.recipe import data_folder, find_recipe, load_recipe
from soli.train.evaluate import evaluate
from soli.train.settings import read_settings
from soli.train.setup import prepare
from soli.train.trainer import take_step

PAPER_PERCENT = 0.25
LAST = 20  # training losses that are averaged
SEQUENCES, HELDOUT_TOKENS, RATE = 8, 16384, 3e-3


def learn(precision: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train anew and measure: mean loss of the last steps, and held-out loss, in nats per token."""
    changes = {
        "run.precision": f'"{precision}"', "run.micro_sequences": SEQUENCES, "schedule.batch_sequences": SEQUENCES,
        "schedule.warmup_tokens": 20_000, "schedule.learning_rate": RATE, "eval.tokens": HELDOUT_TOKENS,
    }  # fmt: skip
    table = load_recipe(find_recipe("nano-zh-en"), [f"{key}={value}" for key, value in changes.items()])
    run = prepare(read_settings(table), {}, data_folder(table), folder / precision)
    losses = []
    for number in range(1, steps + 1):
        losses.append(take_step(run).loss)
        if number % 10 == 0:
            record.progress(f"{precision}, step {number} of {steps}: loss {losses[-1]:.4f}")
    held = evaluate(run.model, run.stage.heldout_BW, run.bytes_V, SEQUENCES, run.tokenizer.eos_id)
    return {"last_steps": statistics.mean(losses[-LAST:]), "held_out": held.loss, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of 2,048 tokens (default 200)")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {precision: learn(precision, steps, Path(folder)) for precision in ("bf16", "fp8")}
    difference = {
        what: record.rounded(100 * (found["fp8"][what] / found["bf16"][what] - 1))
        for what in ("last_steps", "held_out")
    }
    size = {"model": "nano", "steps": steps, "tokens_per_step": SEQUENCES * 256, "seeds": 1, "last_steps": LAST}
    result = {"relative_difference_percent": difference, "paper_percent": PAPER_PERCENT, "loss": found}
    file = record.write("fp8_loss", {"hardware": record.hardware(), "size": size, **result})
    print(f"FP8 against bf16: {difference} % (paper: below {PAPER_PERCENT} %)")
    print(f"written to {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
