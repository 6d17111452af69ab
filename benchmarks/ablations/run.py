"""Train the arms of the ablations, each with several seeds, one thread; one JSON line per finished run.

A seed fixes the first weights' draw and the order of the data, so that arms of one seed read the same windows. Runs
that the file of lines already holds are left out, so the same command continues where an earlier one was stopped. Needs
the data of the recipe nano-zh-en (soli data build nano-zh-en). A run takes a minute or two on one core.

    python benchmarks/ablations/run.py --all --dry-run
    python benchmarks/ablations/run.py --experiment a --experiment e --data data/nano-zh-en --seeds 3
    python benchmarks/ablations/summary.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import record
import torch
from ablations.arms import ARMS, EXPERIMENTS, arm_settings, check_equal, flops_per_token

from soli.analysis.parameters import count
from soli.eval.scoring import score_sequences
from soli.train.balance import measure_load
from soli.train.evaluate import evaluate
from soli.train.settings import TrainSettings
from soli.train.setup import Run, prepare
from soli.train.trainer import StepResult, take_step

TOKENS = 409_600  # of the baseline: 200 steps
LAST = 50  # steps that training's figures are means of
FINISHED = record.ROOT / "runs" / "ablations" / "finished.jsonl"


def train_arm(settings: TrainSettings, data: Path) -> dict[str, Any]:
    """One whole run: its figures on held-out text and over its last steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(settings, {}, data, Path(folder))
        steps = []
        while run.progress.tokens < settings.schedule.total_tokens:
            steps = [*steps[1 - LAST :], take_step(run)]
        return {"tokens": run.progress.tokens, "steps": run.progress.step, **on_training(run, steps), **on_heldout(run)}


def on_training(run: Run, steps: list[StepResult]) -> dict[str, Any]:
    """Loss and load of the last steps. MTP modules' routers are left out: not every arm has one."""
    metrics: dict[str, Any] = {"train_loss": statistics.mean(step.loss for step in steps)}
    layers = run.settings.model.num_moe_layers
    if layers:
        loads = [load for step in steps for load in measure_load(step.counts_LE[:layers])]
        metrics["train_violation"] = statistics.mean(load.max_violation for load in loads)
        metrics["train_idle"] = sum(load.dead_experts for load in loads) / len(steps)  # experts, of all layers together
    return metrics


def on_heldout(run: Run) -> dict[str, Any]:
    """Next-token loss (nats per token), bits per byte, load and MTP acceptance over the same held-out windows."""
    model, settings = run.model, run.settings
    result = evaluate(model, run.stage.heldout_BW, run.bytes_V, settings.run.micro_sequences, run.tokenizer.eos_id)
    readings = list(
        score_sequences(model, run.stage.heldout_BW[:, : settings.schedule.sequence_length].tolist(), context=1)
    )
    metrics: dict[str, Any] = {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
    if settings.model.num_moe_layers:
        loads = measure_load(torch.from_numpy(sum(reading.counts_LE for reading in readings)))
        metrics["heldout_violation"] = statistics.mean(load.max_violation for load in loads)
        metrics["heldout_idle"] = sum(load.dead_experts for load in loads)
    tried = sum(reading.mtp_predictions for reading in readings)
    if tried:
        metrics["mtp_acceptance"] = sum(reading.mtp_agreements for reading in readings) / tried
    return metrics


def missing(file: Path, names: list[str], seeds: int, tokens: int) -> Iterator[tuple[str, int]]:
    """(arm, seed) still to be trained, every arm of one seed before the next seed begins."""
    finished_runs = {(line["arm"], line["seed"], line["budget"]) for line in read_lines(file)}
    for seed in range(seeds):
        yield from ((name, seed) for name in names if (name, seed, tokens) not in finished_runs)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The finished runs; none when there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def add_line(file: Path, line: dict[str, Any]) -> None:
    """One more finished run; a kill leaves the file as it was or with the whole line."""
    draft = file.with_name(f".{file.name}")
    draft.write_text("".join(json.dumps(one) + "\n" for one in [*read_lines(file), line]), encoding="utf-8")
    os.replace(draft, file)


def selected_arms(experiments: list[str], arms: Sequence[str] = ()) -> list[str]:
    """These arms and those of the experiments named, each once, in the table's order."""
    selected = {*arms, *(arm for name in experiments for arm in EXPERIMENTS[name].arms)}
    return [name for name in ARMS if name in selected]


def print_arms(names: list[str], tokens: int) -> None:
    """The dry run: what each arm would be and cost."""
    print(f"{'arm':<13}{'total':>11}{'activated':>11}{'tokens':>11}{'TFLOP':>8}  what")
    for name in names:
        settings = arm_settings(name, tokens)
        size = count(settings.model)
        length = settings.schedule.total_tokens
        cost = length * flops_per_token(settings) / 1e12
        print(f"{name:<13}{size.total:>11,}{size.activated:>11,}{length:>11,}{cost:>8.1f}  {ARMS[name].what}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", action="append", choices=sorted(EXPERIMENTS), help="may be repeated")
    parser.add_argument("--arm", action="append", choices=sorted(ARMS), help="one arm alone; may be repeated")
    parser.add_argument("--all", action="store_true", help="every experiment")
    parser.add_argument("--data", type=Path, default=Path("data/nano-zh-en"), help="what soli data build left")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of the baseline (default {TOKENS:,})")
    parser.add_argument("--out", type=Path, default=FINISHED, help="file of finished runs, one JSON object a line")
    parser.add_argument("--dry-run", action="store_true", help="list the arms and stop")
    options = parser.parse_args(arguments)
    if not options.all and not options.experiment and not options.arm:
        parser.error("name an experiment or an arm, or --all")
    experiments = sorted(EXPERIMENTS) if options.all else options.experiment or []
    names = selected_arms(experiments, options.arm or [])
    check_equal(options.tokens)
    if options.dry_run:
        print_arms(names, options.tokens)
        return
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    commit = record.hardware()["commit"]
    for name, seed in missing(options.out, names, options.seeds, options.tokens):
        metrics = train_arm(arm_settings(name, options.tokens, seed), options.data)
        add_line(options.out, {"arm": name, "seed": seed, "budget": options.tokens, "commit": commit, **metrics})
        record.progress(f"{name}, seed {seed}: {metrics['loss']:.4f} nats per token on held-out text")


if __name__ == "__main__":
    main()
