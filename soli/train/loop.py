"""The training loop: windows -> micro-batches -> losses -> clip -> optimizer -> bias step -> report, evaluate, save.

`prepare` builds a run from settings and data, resuming when its folder holds a whole checkpoint; `train` drives it to the
end of the schedule, to its time limit, or to SIGINT or SIGTERM, and leaves the state saved in each case.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.train.balance import measure_load, reduce_counts, step_bias
from soli.train.batches import Batches, PackedTokens, heldout_windows
from soli.train.evaluate import bytes_per_token, evaluate, translate_samples
from soli.train.losses import compute_losses, count_targets
from soli.train.optimizer import Optimizer
from soli.train.report import Report
from soli.train.schedule import bias_speed, learning_rate, mtp_weight
from soli.train.settings import TrainSettings, as_recipe
from soli.train.state import Progress, checkpoints, load_checkpoint, save_checkpoint, write_json


@dataclass(frozen=True)
class Step:
    """What one optimizer step measured."""

    loss: float  # nats per token
    mtp: float  # nats per unmasked target, mean over depths
    balance: float  # sum over layers of the sequence-wise loss, before alpha; the number of MoE layers when even
    norm: float  # of the gradient, before clipping
    counts_LE: Tensor


@dataclass
class Run:
    """Everything a run needs, built once."""

    folder: Path
    settings: TrainSettings
    model: Transformer
    optimizer: Optimizer
    batches: Batches
    tokenizer: Tokenizer
    heldout_BW: Tensor
    sentences: list[tuple[str, str]]
    progress: Progress = field(default_factory=Progress)


def prepare(settings: TrainSettings, data: dict[str, Any], data_folder: Path, run_folder: Path) -> Run:
    """Build model, optimizer and data; resume from the run folder's latest checkpoint when there is one."""
    device = choose_device(settings.run.device)
    tokenizer = Tokenizer.from_folder(data_folder)
    if tokenizer.vocab_size > settings.model.vocab_size:
        raise SoliError(
            f"the tokenizer in {data_folder} has {tokenizer.vocab_size} entries, but model.vocab_size is "
            f"{settings.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size}"
        )
    compute = choose_precision(settings.run.precision, device)
    model = Transformer(settings.model, device=device, dtype=torch.float32)
    torch.manual_seed(settings.run.seed)
    model.init_weights(torch.Generator(device).manual_seed(settings.run.seed))
    model.compute_dtype = compute
    schedule, extra = settings.schedule, 1 + settings.model.num_nextn_predict_layers
    train_tokens, valid_tokens = PackedTokens(data_folder, "train"), PackedTokens(data_folder, "valid")
    run = Run(
        folder=run_folder,
        settings=settings,
        model=model,
        optimizer=Optimizer(model, settings.optimizer, compute),
        batches=Batches(train_tokens, schedule.sequence_length, extra, settings.run.seed),
        tokenizer=tokenizer,
        heldout_BW=heldout_windows(valid_tokens, schedule.sequence_length, extra, settings.eval.tokens),
        sentences=read_sentences(data_folder / "heldout.tsv", settings.eval.samples),
    )
    _settle_recipe(run, as_recipe(settings, data))
    tokenizer.save(run_folder)
    found = checkpoints(run_folder)
    if found:
        run.progress = load_checkpoint(found[-1], model, run.optimizer)
    return run


def choose_device(wanted: str) -> torch.device:
    """`auto`: the first CUDA device, else the CPU. SoliError when the device asked for is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SoliError(f"run.device is {wanted!r}, which this machine lacks ({str(error).splitlines()[0]})") from None
    return device


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Dtype of activations. `auto`: bf16 where the hardware multiplies it natively, else fp32."""
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def read_sentences(file: Path, count: int) -> list[tuple[str, str]]:
    """Held-out sentences to translate now and then: (text, target language), spread over the file, directions in turn."""
    if count == 0 or not file.is_file():
        return []
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row) == 3]
    picked = [rows[(2 * n + 1) * len(rows) // (2 * count)] for n in range(min(count, len(rows)))]
    return [(en, "zh") if n % 2 == 0 else (zh, "en") for n, (_, zh, en) in enumerate(picked)]


def take_step(run: Run) -> Step:
    """One optimizer step over `batch_sequences` windows, and one step of the router biases. Raises SoliError on NaN."""
    settings, progress, model = run.settings, run.progress, run.model
    eos_id, device = run.tokenizer.eos_id, model.embed_tokens.weight.device
    weight, alpha = mtp_weight(settings.losses, progress.tokens), settings.balance.alpha
    window_BW = run.batches.take(progress.position, settings.schedule.batch_sequences)
    totals = count_targets(window_BW, settings.model.num_nextn_predict_layers, eos_id)
    sums, counts_LE = torch.zeros(3, device=device), None
    for part_BW in window_BW.split(settings.run.micro_sequences):
        losses = compute_losses(model, part_BW.to(device), totals, eos_id)
        losses.total(weight, alpha).backward()
        mtp = torch.stack(losses.mtp).mean() if losses.mtp else losses.balance.new_zeros(())
        sums += torch.stack((losses.next_token, mtp, losses.balance)).detach()
        counts_LE = losses.counts_LE if counts_LE is None else counts_LE + losses.counts_LE
    assert counts_LE is not None
    loss, mtp_loss, balance = sums.tolist()
    if not math.isfinite(loss + mtp_loss):
        raise SoliError(
            f"the loss is {loss} at step {progress.step + 1}; the last checkpoint is untouched: resume with a lower schedule.learning_rate"
        )
    norm = run.optimizer.step(learning_rate(settings.schedule, progress.tokens))
    counts_LE = reduce_counts(counts_LE)
    step_bias(model, counts_LE, bias_speed(settings.balance, progress.tokens))
    progress.step += 1
    progress.tokens += totals.tokens
    progress.position += window_BW.shape[0]
    progress.valid_loss = None
    return Step(loss, mtp_loss, balance, norm, counts_LE)


def train(run: Run) -> str:
    """Train to the end of the schedule or until stopped; returns why it ended: "finished", "time" or "signal"."""
    settings, progress = run.settings, run.progress
    total, layers = settings.schedule.total_tokens, [name for name, _ in run.model.moe_layers()]
    limit = math.inf if settings.run.max_minutes is None else time.monotonic() + 60 * settings.run.max_minutes
    with _stop_on_signal() as stopped, Report(run.folder, total, progress.tokens) as report:
        if progress.step:
            report.say(f"resuming after step {progress.step}, {progress.tokens / 1e6:.2f} M tokens")
        while progress.tokens < total:
            began = time.monotonic()
            lr = learning_rate(settings.schedule, progress.tokens)
            step = take_step(run)
            seconds = time.monotonic() - began
            progress.seconds += seconds
            figures = {"loss": step.loss, "mtp": step.mtp, "balance": step.balance, "lr": lr, "norm": step.norm}
            figures["tokens_per_second"] = settings.schedule.batch_tokens / seconds
            loads = dict(zip(layers, measure_load(step.counts_LE), strict=True))
            last = progress.tokens >= total
            report.step(progress, figures, loads, speak=last or _due(progress.step, settings.run.log_every))
            if last or _due(progress.step, settings.eval.every):
                measure(run, report)
            if stopped or time.monotonic() >= limit or last or _due(progress.step, settings.run.save_every):
                saved = save_checkpoint(run.folder, run.model, run.optimizer, progress, settings.run.keep)
            if last or stopped or time.monotonic() >= limit:
                why = "finished" if last else "signal" if stopped else "time"
                report.say(f"{'finished' if last else 'stopped'} after step {progress.step}; state is in {saved}")
                return why
    return "finished"


def measure(run: Run, report: Report) -> None:
    """Evaluate on held-out windows and translate the samples; the loss is kept for choosing the best checkpoint."""
    began, settings = time.monotonic(), run.settings
    bytes_V = bytes_per_token(run.tokenizer, settings.model.vocab_size)
    result = evaluate(run.model, run.heldout_BW, bytes_V, settings.run.micro_sequences, run.tokenizer.eos_id)
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


def _settle_recipe(run: Run, recipe: dict[str, Any]) -> None:
    """Keep the resolved recipe beside the run; refuse to resume with another model or another order of the data."""
    file = run.folder / "recipe.resolved.json"
    if not file.is_file() or not checkpoints(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, recipe)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    fixed = [("model", key) for key in recipe["model"]] + [("schedule", "sequence_length"), ("run", "seed"), ("optimizer", "name")]
    for section, key in fixed:
        old, new = before[section].get(key), recipe[section].get(key)
        if old != json.loads(json.dumps(new)):
            raise SoliError(f"{run.folder} was begun with {section}.{key} = {old!r}, not {new!r}; choose another --out to begin anew")
