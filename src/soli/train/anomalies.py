"""What happens to a step whose loss or gradient is not finite, or jumps: it stops the run, is skipped, or is reported.

A spike is a loss, or a norm of the gradient before clipping, above

    median + run.spike_factor * max(median absolute deviation, 2 % of the median)

over the last 50 steps that moved weights; until there are 50, nothing is a spike. A skipped step uses up its windows
and moves no weight, no moment and no bias. Skipping cannot heal a weight that is itself not finite: that always stops.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.train.checkpoints import RunProgress
from soli.train.losses import StepTotals, compute_losses
from soli.train.setup import Run

WINDOW = 50  # steps
FLOOR = 0.02  # of the median: a run at rest must not see spikes in its rounding
MOST_SKIPS = 10  # in a row; where the next one would be due, the data or the weights have changed for good


@dataclass(frozen=True)
class Anomaly:
    """Why a step is not as it should be, and what the rule makes of it."""

    kind: str  # nan, spike
    rule: str  # stop, skip, report
    why: str  # a clause: figures and step
    layer: str  # where it begins; for a spike, where the gradient is largest


class TrainingStopped(SoliError):
    """The guard ends the run; with `saves`, the state before the step is worth keeping."""

    def __init__(self, sentence: str, saves: bool) -> None:
        super().__init__(sentence)
        self.saves = saves


def examine(
    run: Run, parts: Sequence[Tensor], totals: StepTotals, losses: Sequence[float], norm: float
) -> Anomaly | None:
    """Judge the step that comes next, its gradients at hand and nothing moved yet; None: it is sound.

    `parts` are its micro-batches, `losses` next token, MTP and balance, `norm` that of the gradient before clipping.
    """
    settings, progress, at = run.settings.run, run.progress, f"at step {run.progress.step + 1}"
    if not all(map(math.isfinite, (*losses, norm))) or not _sound_biases(run.model):
        layer, where = _locate(run, parts, totals, all(map(math.isfinite, losses)))
        loss, mtp, balance = losses
        figures = f"the loss is {loss} (MTP {mtp}, balance {balance}) and the gradient's norm {norm} {at}"
        return Anomaly("nan", "stop" if _poisoned(run.model) else settings.on_nan, f"{figures}; {where}", layer)
    jumps = [
        f"{name} {value:.4g} {at} (median of the last {WINDOW}: {statistics.median(past):.4g})"
        for name, value, past in (("loss", losses[0], progress.losses), ("gradient norm", norm, progress.norms))
        if is_spike(past, value, settings.spike_factor)
    ]
    if not jumps:
        return None
    layer = largest_gradient(run.model)
    return Anomaly("spike", settings.spike, f"{', '.join(jumps)}; the largest gradient is in {layer}", layer)


def enforce(trouble: Anomaly, progress: RunProgress) -> None:
    """Stopped where the rule says so, or where the step would be the tenth skip in a row."""
    in_row = trouble.rule == "skip" and progress.skipped_in_row + 1 >= MOST_SKIPS
    if trouble.rule != "stop" and not in_row:
        return
    after = f" after {MOST_SKIPS - 1} skipped steps in a row" if in_row else ""
    if trouble.kind == "nan":
        mend = "the last checkpoint is whole: resume it with a lower schedule.learning_rate"
        raise TrainingStopped(f"{trouble.why}; training stopped{after} before any weight moved; {mend}", saves=False)
    mend = "is saved: resume with run.spike = report, a larger run.spike_factor or a lower schedule.learning_rate"
    sentence = f"spike: {trouble.why}; training stopped{after}, and the state before that step {mend}"
    raise TrainingStopped(sentence, saves=True)


def remember(progress: RunProgress, loss: float, norm: float, skipped: bool) -> None:
    """Keep a step's figures for judging later ones; those of skipped steps are only counted."""
    progress.skipped += skipped
    progress.skipped_in_row = progress.skipped_in_row + 1 if skipped else 0
    if not skipped:
        progress.losses = [*progress.losses, loss][-WINDOW:]
        progress.norms = [*progress.norms, norm][-WINDOW:]


def explain(error: SoliError, model: Transformer) -> SoliError:
    """`error`, raised in a forward pass, with the weight that is to blame; FP8 refuses one that is not finite."""
    name = _poisoned(model)
    if not name:
        return error
    mend = "resume an earlier checkpoint with a lower schedule.learning_rate"
    return TrainingStopped(f"{name} is not finite ({error}), so training stopped; {mend}", saves=False)


def is_spike(past: Sequence[float], value: float, factor: float) -> bool:
    """Whether `value` stands out above the last WINDOW values; factor 0: never."""
    if not factor or len(past) < WINDOW:
        return False
    middle = statistics.median(past)
    spread = statistics.median(abs(one - middle) for one in past)
    return value > middle + factor * max(spread, FLOOR * middle)


def largest_gradient(model: nn.Module) -> str:
    """The module whose own parameters have the largest gradient norm."""
    squares: dict[str, float] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            owner = name.rpartition(".")[0]
            squares[owner] = squares.get(owner, 0.0) + float(p.grad.double().square().sum())
    return max(squares, key=lambda owner: squares[owner], default="no layer")


@torch.no_grad()
def find_source(model: Transformer, parts: Sequence[Tensor], totals: StepTotals, eos_id: int) -> str:
    """The first module that makes values which are not finite of finite ones, forward once more; "" when none does.

    Embedding and head are used through their weights and are no modules here.
    """
    found: list[str] = []

    def look(name: str, inputs: Any, output: Any) -> None:
        if not found and not _finite(output) and _finite(inputs):
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: look(name, inputs, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        for part_BW in parts:
            compute_losses(model, part_BW.to(model.embed_tokens.weight.device), totals, eos_id)
            if found:
                return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return ""


def _locate(run: Run, parts: Sequence[Tensor], totals: StepTotals, sound_loss: bool) -> tuple[str, str]:
    """(layer, clause) of what is not finite: a layer's output, a weight, a gradient, or what remains."""
    model = run.model
    source, weight = find_source(model, parts, totals, run.tokenizer.eos_id), _poisoned(model)
    if source or weight:
        layer = source or weight.rpartition(".")[0]
        cause = f", and {weight} holds such values" if weight else ""
        return layer, f"{layer} is the first layer whose output is not finite{cause}"
    if not sound_loss:
        return "lm_head", "every layer's output is finite, so it is the logits of lm_head that are not"
    for name, p in reversed(list(model.named_parameters())):  # backward: what is nearest to the loss comes first
        if p.grad is not None and not p.grad.isfinite().all():
            return name.rpartition(".")[0], f"the gradient of {name} is not finite, though every layer's output is"
    layer = largest_gradient(model)
    return layer, f"the norm is beyond float32, the largest gradient in {layer}"


def _poisoned(model: nn.Module) -> str:
    """The first weight or router bias that is not finite; "" when all are."""
    return next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), "")


def _sound_biases(model: Transformer) -> bool:
    """Whether every router's bias is finite: one that is not lets its expert in always, and no loss shows it."""
    biases = [moe.gate.e_score_correction_bias for _, moe in model.moe_layers()]
    held = [bias_E for bias_E in biases if bias_E is not None]
    return not held or bool(torch.stack(held).isfinite().all())


def _finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module takes or gives: tuples, and the router's decision."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(tuple(vars(value).values()))
