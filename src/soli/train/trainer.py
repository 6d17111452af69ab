"""The training loop: windows -> micro-batches -> losses -> clip -> optimizer -> bias step -> report, evaluate, save.

`train` drives a run to the end of the schedule, to its time limit, or to SIGINT or SIGTERM, and leaves the state saved
in each case. A step that is not finite or spikes is dealt with by soli/train/anomalies.py before anything is changed.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soli.errors import SoliError
from soli.train import anomalies
from soli.train.balance import measure_load, reduce_counts, step_bias
from soli.train.checkpoint_saver import CheckpointSaver
from soli.train.evaluate import evaluate, translate_samples
from soli.train.losses import StepTotals, compute_losses, count_targets
from soli.train.precision import fp8_note
from soli.train.report import RunReport
from soli.train.schedule import stage_name
from soli.train.setup import Run
from soli.train.stages import flops_left, is_finished, next_step, stage_tokens_left, token_flops


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured."""

    loss: float  # nats per token
    mtp: float  # nats per unmasked target, mean over depths
    balance: float  # sum over layers of the sequence-wise loss, before alpha; the number of MoE layers when even
    norm: float  # of the gradient, before clipping
    rate: float  # learning rate
    tokens: int  # that it learned to predict
    counts_LE: Tensor
    trouble: anomalies.Anomaly | None  # a spike, or why the step moved nothing

    @property
    def skipped(self) -> bool:
        return self.trouble is not None and self.trouble.rule == "skip"


def take_step(run: Run) -> StepResult:
    """One optimizer step over the batch that the schedule says, then one of the biases.

    anomalies.TrainingStopped where the guard says so; nothing has moved then.
    """
    settings, progress = run.settings, run.progress
    sequences, rate = next_step(settings, progress)
    window_BW = run.stage.batches.take(progress.position, sequences)
    totals = count_targets(window_BW, settings.model.num_nextn_predict_layers, run.tokenizer.eos_id)
    try:
        (loss, mtp, balance), counts_LE = accumulate(run, window_BW, totals)
    except SoliError as error:
        raise anomalies.explain(error, run.model) from None
    norm = run.optimizer.gradient_norm()
    parts = window_BW.split(run.stage.micro_sequences)
    trouble = anomalies.examine(run, parts, totals, (loss, mtp, balance), float(norm))
    if trouble is not None:
        anomalies.enforce(trouble, progress)
    step = StepResult(loss, mtp, balance, float(norm), rate, totals.tokens, reduce_counts(counts_LE), trouble)
    if step.skipped:
        run.optimizer.clear()
    else:
        run.optimizer.step(rate, norm)
        step_bias(run.model, step.counts_LE, settings.balance.gamma_at(progress.tokens))
    anomalies.remember(progress, step.loss, step.norm, step.skipped)
    progress.step += 1
    progress.tokens += totals.tokens
    progress.position += window_BW.shape[0]
    progress.valid_loss = None
    return step


def accumulate(run: Run, window_BW: Tensor, totals: StepTotals) -> tuple[list[float], Tensor]:
    """Gradients of one optimizer step, micro-batch by micro-batch; its three losses and its tokens per expert."""
    settings, device = run.settings, run.model.embed_tokens.weight.device
    weight = settings.losses.mtp_weight_at(run.progress.tokens)
    alpha = settings.balance.alpha
    if run.graphed is not None and window_BW.shape[0] <= run.stage.micro_sequences:
        found = run.graphed(window_BW, totals, weight)
        if found is not None:
            return found[0].tolist(), found[1]
    sums, counts = torch.zeros(3, device=device), []
    for part_BW in window_BW.to(device).split(run.stage.micro_sequences):
        losses = compute_losses(run.model, part_BW, totals, run.tokenizer.eos_id)
        losses.total(weight, alpha).backward()
        sums += losses.parts()
        counts.append(losses.counts_LE)
    return sums.tolist(), torch.stack(counts).sum(0)


def train(run: Run) -> str:
    """Train to the end of the last stage or until stopped; returns why it ended: "finished", "time" or "signal"."""
    settings, progress = run.settings, run.progress
    limit = math.inf if settings.run.max_minutes is None else time.monotonic() + 60 * settings.run.max_minutes
    saver = CheckpointSaver(run.folder, settings.run.keep)
    with _stop_on_signal() as stopped, saver, _open_report(run) as report:
        if settings.run.precision == "fp8":
            report.say(fp8_note(run.model.embed_tokens.weight.device))
        if progress.step:
            report.say(
                f"resuming after step {progress.step}, {progress.tokens / 1e6:.2f} M of "
                f"{settings.total_tokens / 1e6:.2f} M tokens"
            )
        why = "finished" if is_finished(settings, progress) else ""
        while not why:
            saver.check()
            if stage_tokens_left(settings, progress) <= 0:
                run.begin_next_stage()
                report.say(f"{stage_name(progress.stage)} begins: sequences of {run.stage.length:,} tokens")
            _guarded_step(run, report, saver)
            ended = stage_tokens_left(settings, progress) <= 0
            if is_finished(settings, progress):
                why = "finished"
            elif stopped:
                why = "signal"
            elif time.monotonic() >= limit:
                why = "time"
            if ended or _due(progress.step, settings.eval.every):
                measure(run, report)
            if why or ended or _due(progress.step, settings.run.save_every):
                saver.save(run.model, run.optimizer, progress)
        saver.wait()
        report.say(
            f"{'finished' if why == 'finished' else 'stopped'} after step {progress.step}; state is in {run.folder}"
        )
        report.end(progress, why)
    return why


def _open_report(run: Run) -> RunReport:
    settings = run.settings
    return RunReport(
        run.folder,
        settings.total_tokens,
        run.progress,
        tensorboard=settings.run.tensorboard,
        work_left=lambda progress: flops_left(settings, progress),
    )


def _guarded_step(run: Run, report: RunReport, saver: CheckpointSaver) -> None:
    try:
        _step_and_report(run, report)
    except anomalies.TrainingStopped as stop:
        if stop.saves:
            saver.save(run.model, run.optimizer, run.progress)
            saver.wait()
        report.end(run.progress, "stopped by the guard")
        raise


def _step_and_report(run: Run, report: RunReport) -> None:
    settings, progress, began = run.settings, run.progress, time.monotonic()
    step = take_step(run)
    seconds = time.monotonic() - began
    progress.seconds += seconds
    if step.trouble is not None:
        report.trouble(progress, step.trouble, step.loss, step.norm)
    if step.skipped:
        return
    figures = {"loss": step.loss, "mtp": step.mtp, "balance": step.balance, "lr": step.rate, "norm": step.norm}
    figures["tokens_per_second"] = step.tokens / seconds
    figures["tflops"] = step.tokens * token_flops(settings, progress.stage) / seconds / 1e12
    layers = [name for name, _ in run.model.moe_layers()]
    loads = dict(zip(layers, measure_load(step.counts_LE), strict=True))
    ended = stage_tokens_left(settings, progress) <= 0
    report.step(progress, figures, loads, speak=ended or _due(progress.step, settings.run.log_every))


def measure(run: Run, report: RunReport) -> None:
    """Evaluate on held-out windows and translate the samples; the loss is kept for choosing the best checkpoint."""
    began, settings = time.monotonic(), run.settings
    stage = run.stage
    result = evaluate(run.model, stage.heldout_BW, run.bytes_V, stage.micro_sequences, run.tokenizer.eos_id)
    run.progress.valid_loss = result.loss
    samples = translate_samples(run.model, run.tokenizer, run.sentences, settings.eval.sample_tokens)
    report.evaluation(run.progress, result, samples, time.monotonic() - began)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM arrives; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
