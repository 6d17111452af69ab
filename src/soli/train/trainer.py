"""The training loop: windows -> micro-batches -> losses -> clip -> optimizer -> bias step -> report, evaluate, save.

`train` runs to the end of the schedule, to its time limit, or to SIGINT, SIGTERM or SIGHUP, and saves the state in each
case. A step that is not finite or spikes is detected (soli/train/anomalies.py) before anything is changed.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soli.errors import SoliError
from soli.parallel.stages import micro_batch_size
from soli.train import anomalies
from soli.train.balance import measure_load, mixture_names, reduce_counts, step_bias
from soli.train.batches import rank_slice
from soli.train.checkpoint_saver import CheckpointSaver
from soli.train.evaluate import evaluate, translate_samples
from soli.train.finite import resume_advice
from soli.train.losses import StageLosses, StepTotals, compute_losses, count_targets, input_length
from soli.train.model_options import precision_note
from soli.train.mtp_alone import compute_draft_losses
from soli.train.report import RunReport, SilentReport
from soli.train.schedule import stage_name
from soli.train.setup import Run
from soli.train.stages import flops_left, is_finished, next_step, stage_tokens_left

if TYPE_CHECKING:
    from soli.parallel.pipeline import Pipeline

SIGNAL = 1  # bits of why a rank wants to stop
DEADLINE = 2


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured."""

    loss: float  # nats per token
    mtp: float  # nats per unmasked target, mean over depths
    balance: float  # sum over layers of the sequence-wise loss, before alpha; the number of MoE layers when even
    norm: float  # of the gradient, before clipping
    learning_rate: float
    tokens: int  # that it learned to predict
    counts_LE: Tensor
    anomaly: anomalies.Anomaly | None

    @property
    def skipped(self) -> bool:
        """Whether the step changed no weight, no moment and no bias."""
        return self.anomaly is not None and self.anomaly.action == "skip"


def take_step(run: Run) -> StepResult:
    """One optimizer step over the schedule's next batch, then one of the biases.

    anomalies.TrainingStopped where an anomaly ends the run; nothing has changed then.
    """
    settings, progress = run.settings, run.progress
    sequences, learning_rate = next_step(settings, progress)
    shares = run.shares
    window_BW = run.stage.batches.take(*rank_slice(progress.position, sequences, shares.rank, shares.world))
    mtp_depth = settings.model.num_nextn_predict_layers
    if not settings.losses.trains_mtp(progress.tokens):
        window_BW, mtp_depth = window_BW[:, : run.stage.length + 1], 0
    totals = count_targets(window_BW, mtp_depth, run.tokenizer.eos_id, shares)
    try:
        (loss, mtp, balance), counts_LE = accumulate(run, window_BW, totals)
    except SoliError as error:
        raise anomalies.explain_error(error, run.model) from None
    norm = run.optimizer.gradient_norm()
    parts = window_BW.split(run.stage.micro_sequences)
    anomaly = anomalies.detect_anomaly(run, parts, totals, (loss, mtp, balance), float(norm))
    if anomaly is not None:
        anomalies.stop_if_required(anomaly, progress)
    counts_LE = reduce_counts(counts_LE)
    step = StepResult(loss, mtp, balance, float(norm), learning_rate, totals.tokens, counts_LE, anomaly)
    if step.skipped:
        run.optimizer.clear()
    else:
        run.optimizer.step(learning_rate, norm)
        names = mixture_names(settings.model, settings.losses.mtp_alone)
        step_bias(run.model, step.counts_LE, settings.balance.gamma_at(progress.tokens), names)
    anomalies.record_step(progress, step.loss, step.norm, step.skipped)
    progress.step += 1
    progress.tokens += totals.tokens
    progress.position += sequences
    progress.valid_loss = None
    return step


def accumulate(run: Run, window_BW: Tensor, totals: StepTotals) -> tuple[list[float], Tensor]:
    """Gradients of one optimizer step, micro-batch by micro-batch; `window_BW` are this rank's windows.

    Returns the losses of the whole step (next token, MTP, balance) and this rank's tokens per expert.
    """
    if run.pipeline is not None:
        return _accumulate_stages(run, run.pipeline, window_BW, totals)
    settings, device = run.settings, run.model.embed_tokens.weight.device
    weight = settings.losses.mtp_weight_at(run.progress.tokens)
    alpha = settings.balance.alpha
    if run.cuda_graph is not None and window_BW.shape[0] <= run.stage.micro_sequences:
        replayed = run.cuda_graph(window_BW, totals, weight)
        if replayed is not None:
            losses_3, counts_LE = replayed
            return losses_3.tolist(), counts_LE
    compute = compute_draft_losses if settings.losses.mtp_alone else compute_losses
    sums_3 = torch.zeros(3, device=device)
    counts = []
    parts = _micro_batches(run, window_BW.to(device), totals.sequences)
    for number, part_BW in enumerate(parts, 1):
        if settings.parallel.keep_gathered and run.ranks.world > 1:
            from soli.parallel.sharding import keep_gathered

            keep_gathered(run.model, is_last=number == len(parts))
        losses = compute(run.model, part_BW, totals, run.tokenizer.eos_id)
        losses.total(weight, alpha).backward()
        sums_3 += losses.parts()
        counts.append(losses.counts_LE)
    return run.ranks.sum(sums_3).tolist(), torch.stack(counts).sum(0)


def _accumulate_stages(
    run: Run, pipeline: "Pipeline", window_BW: Tensor, totals: StepTotals
) -> tuple[list[float], Tensor]:
    """As `accumulate`, where ranks have the layers of a pipeline's stages."""
    settings = run.settings
    depths = len(totals.mtp_tokens)
    names = mixture_names(settings.model)
    names = [name for name in names if not name.startswith("mtp.") or int(name.removeprefix("mtp.")) < depths]
    weights = settings.losses.mtp_weight_at(run.progress.tokens), settings.balance.alpha
    task = StageLosses(run.model, totals, run.tokenizer.eos_id, weights, names)
    micro = micro_batch_size(pipeline.schedule, pipeline.ranks, len(window_BW), run.stage.micro_sequences)
    assert micro is not None  # settings rejects batches that cannot be divided
    pipeline.train(window_BW.to(task.sums_3.device), micro, input_length(window_BW, totals), task)
    return run.ranks.sum(task.sums_3).tolist(), task.counts_LE


def _micro_batches(run: Run, window_BW: Tensor, sequences: int) -> list[Tensor]:
    """As many on every rank, because each is a forward and backward pass of all; the last may be empty where a rank has
    a sequence less than another."""
    micro = run.stage.micro_sequences
    parts = list(window_BW.split(micro))
    largest_share = ceil(sequences / run.ranks.world)
    passes = ceil(largest_share / micro)
    return parts + [window_BW[:0]] * (passes - len(parts))


def train(run: Run) -> str:
    """Train to the end of the last stage or until stopped; returns why it ended: "finished", "time" or "signal"."""
    settings, progress = run.settings, run.progress
    minutes = settings.run.max_minutes
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    saver = CheckpointSaver(run.folder, settings.run.keep)
    with _stop_on_signal() as signals, saver, _open_report(run) as report:
        _print_start(run, report)
        report.begin(progress, run.model.embed_tokens.weight.device)
        reason = "finished" if is_finished(settings, progress) else ""
        while not reason:
            saver.check()
            if stage_tokens_left(settings, progress) <= 0:
                run.begin_next_stage()
                report.print(f"{stage_name(progress.stage)} begins: sequences of {run.stage.length:,} tokens")
            _step_and_report(run, report, saver)
            stage_ended = stage_tokens_left(settings, progress) <= 0
            stops = run.ranks.any(bool(signals) * SIGNAL | (time.monotonic() >= deadline) * DEADLINE)
            if is_finished(settings, progress):
                reason = "finished"
            elif stops & SIGNAL:
                reason = "signal"
            elif stops & DEADLINE:
                reason = "time"
            if stage_ended or _is_due(progress.step, settings.eval.every):
                measure(run, report)
            if reason or stage_ended or _is_due(progress.step, settings.run.save_every):
                saver.save(run.model, run.optimizer, progress)
        saver.wait()
        ended = "finished" if reason == "finished" else "stopped"
        report.print(f"{ended} after step {progress.step}; state is in {run.folder}")
        report.end(progress, reason)
    return reason


def _open_report(run: Run) -> RunReport:
    if not run.ranks.is_first:
        return SilentReport()
    return RunReport(
        run.folder,
        run.settings.total_tokens,
        run.progress,
        tensorboard=run.settings.run.tensorboard,
        work_left=lambda progress: flops_left(run.settings, progress),
    )


def _print_start(run: Run, report: RunReport) -> None:
    progress = run.progress
    note = precision_note(run.settings.run.precision, run.model.embed_tokens.weight.device)
    if note is not None:
        report.print(note)
    if run.settings.parallel.expert > 1:
        from soli.parallel.dispatch import dispatch_note

        report.print(dispatch_note(run.settings.parallel.expert))
    if run.lock is not None and not run.lock.is_exclusive:
        report.print(f"{run.folder} is on a file system without locks: start no second soli train in it")
    if progress.step:
        tokens = f"{progress.tokens / 1e6:.2f} M of {run.settings.total_tokens / 1e6:.2f} M tokens"
        report.print(f"resuming after step {progress.step}, {tokens}")


def _step_and_report(run: Run, report: RunReport, saver: CheckpointSaver) -> None:
    """One step; where an anomaly ends the run, the state before the step is saved if it is worth it."""
    settings, progress = run.settings, run.progress
    start = time.monotonic()
    try:
        step = take_step(run)
    except anomalies.TrainingStopped as stop:
        if stop.save_state:
            saver.save(run.model, run.optimizer, progress)
        saver.wait()
        report.end(progress, "anomaly")
        if stop.save_state:
            raise
        raise anomalies.TrainingStopped(f"{stop}; {resume_advice(run.folder)}", save_state=False) from None
    seconds = time.monotonic() - start
    progress.seconds += seconds
    if step.anomaly is not None:
        report.anomaly(progress, step.anomaly, step.loss, step.norm)
    if step.skipped:
        return
    metrics = {
        "loss": step.loss,
        "mtp": step.mtp,
        "balance": step.balance,
        "lr": step.learning_rate,
        "norm": step.norm,
        "tokens_per_second": step.tokens / seconds,
        "tflops": settings.flops(progress.tokens - step.tokens, step.tokens, run.stage.length) / seconds / 1e12,
    }
    layers = mixture_names(run.model.config, settings.losses.mtp_alone)
    loads = dict(zip(layers, measure_load(step.counts_LE), strict=False))  # of MTP modules once they are trained
    stage_ended = stage_tokens_left(settings, progress) <= 0
    report.step(progress, metrics, loads, log=stage_ended or _is_due(progress.step, settings.run.log_every))


def measure(run: Run, report: RunReport) -> None:
    """Evaluate on held-out windows and translate the samples; the loss is stored for choosing the best checkpoint."""
    start = time.monotonic()
    settings, stage = run.settings, run.stage
    eos_id = run.tokenizer.eos_id
    ranks, shares, pipeline = run.ranks, run.shares, run.pipeline
    micro = stage.micro_sequences
    result = evaluate(run.model, stage.heldout_BW, run.bytes_V, micro, eos_id, ranks, shares, pipeline)
    loss = result.loss
    if settings.losses.mtp_alone and result.mtp_accepted is not None:
        loss = 1 - result.mtp_accepted  # the model's own loss does not move
    run.progress.valid_loss = loss if math.isfinite(loss) else None
    limit = settings.eval.sample_tokens
    samples = translate_samples(run.model, run.tokenizer, run.sentences, limit, ranks, pipeline)
    if run.ranks.world > 1:
        from soli.parallel.sharding import release

        release(run.model, *(run.pipeline.stages if run.pipeline else ()))
    report.evaluation(run.progress, result, samples, time.monotonic() - start)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list of the SIGINT, SIGTERM and SIGHUP received; a second SIGINT interrupts at once. nohup's runs go on."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
