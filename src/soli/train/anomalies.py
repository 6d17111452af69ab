"""Detection of anomalies: a step whose loss or gradient is not finite, or jumps, stops the run, is skipped, or is
reported, as the recipe specifies.

A spike is a loss, or a norm of the gradient before clipping, above

    median + run.spike_factor * max(median absolute deviation, 2 % of the median)

over the last 50 steps that changed weights; until there are 50, nothing is a spike. A skipped step uses up its windows
and changes no weight, no moment and no bias. A weight that is itself not finite always stops the run: skipping steps
would not repair it.
"""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.parallel.ranks import ALONE, Ranks, local_tensor
from soli.train.losses import StepTotals, compute_losses
from soli.train.run_folder import RunProgress
from soli.train.setup import Run

WINDOW = 50  # steps
MIN_DEVIATION = 0.02  # of the median: in a run that has converged, rounding must not count as a spike
MAX_SKIPS = 10  # in a row; at this many the data or the weights have changed for good


@dataclass(frozen=True)
class Anomaly:
    """What is wrong with a step, and what is done about it."""

    kind: str  # nan, spike
    action: str  # stop, skip, report
    reason: str  # a clause: measured values and step
    layer: str  # where it begins; for a spike, where the gradient is largest


class TrainingStopped(SoliError):
    """An anomaly ends the run; with `save_state`, the state before the step is worth saving, else `train` adds to the
    sentence from which checkpoint to resume."""

    def __init__(self, sentence: str, save_state: bool) -> None:
        super().__init__(sentence)
        self.save_state = save_state


def detect_anomaly(
    run: Run, parts: Sequence[Tensor], totals: StepTotals, losses: Sequence[float], norm: float
) -> Anomaly | None:
    """The anomaly of the step whose gradients have been computed and not yet applied; None where there is none.

    `parts` are its micro-batches, `losses` next token, MTP and balance, `norm` that of the gradient before clipping.
    """
    settings, progress = run.settings.run, run.progress
    at_step = f"at step {progress.step + 1}"
    losses_are_finite = all(map(math.isfinite, losses))
    biases_are_finite = not run.ranks.any(not _biases_are_finite(run.model))
    if not losses_are_finite or not math.isfinite(norm) or not biases_are_finite:
        locate = _locate_nonfinite if run.ranks.world == 1 else _locate_in_shards
        layer, where = locate(run, parts, totals, losses_are_finite)
        loss, mtp, balance = losses
        values = f"the loss is {loss} (MTP {mtp}, balance {balance}) and the gradient's norm {norm} {at_step}"
        action = "stop" if any(run.ranks.all_objects(_first_nonfinite_tensor(run.model))) else settings.on_nan
        return Anomaly("nan", action, f"{values}; {where}", layer)
    jumps = [
        f"{name} {value:.4g} {at_step} (median of the last {WINDOW}: {statistics.median(past):.4g})"
        for name, value, past in (("loss", losses[0], progress.losses), ("gradient norm", norm, progress.norms))
        if is_spike(past, value, settings.spike_factor)
    ]
    if not jumps:
        return None
    layer = module_with_largest_gradient(run.model, run.ranks, run.optimizer.copied)
    return Anomaly("spike", settings.spike, f"{', '.join(jumps)}; the largest gradient is in {layer}", layer)


def stop_if_required(anomaly: Anomaly, progress: RunProgress) -> None:
    """TrainingStopped where the recipe requires it, or where the step would be the tenth skipped one in a row."""
    too_many = anomaly.action == "skip" and progress.skipped_in_row + 1 >= MAX_SKIPS
    if anomaly.action != "stop" and not too_many:
        return
    after = f" after {MAX_SKIPS - 1} skipped steps in a row" if too_many else ""
    stopped = f"{anomaly.reason}; training stopped{after}"
    if anomaly.kind == "nan":
        raise TrainingStopped(f"{stopped} before any weight changed", save_state=False)
    raise TrainingStopped(
        f"spike: {stopped}, and the state before that step is saved: resume with run.spike = report, a larger "
        "run.spike_factor or a lower schedule.learning_rate",
        save_state=True,
    )


def record_step(progress: RunProgress, loss: float, norm: float, skipped: bool) -> None:
    """Add a step's loss and norm to the window that later ones are compared with; skipped steps are only counted."""
    progress.skipped += skipped
    progress.skipped_in_row = progress.skipped_in_row + 1 if skipped else 0
    if not skipped:
        progress.losses = [*progress.losses, loss][-WINDOW:]
        progress.norms = [*progress.norms, norm][-WINDOW:]


def explain_error(error: SoliError, model: Transformer) -> SoliError:
    """`error`, raised in a forward pass, with the weight that caused it: FP8 rejects one that is not finite."""
    name = _first_nonfinite_tensor(model)
    if not name:
        return error
    return TrainingStopped(f"{name} is not finite ({error}), so training stopped", save_state=False)


def is_spike(past: Sequence[float], value: float, factor: float) -> bool:
    """Whether `value` is a spike after the last WINDOW values; factor 0: never."""
    if not factor or len(past) < WINDOW:
        return False
    median = statistics.median(past)
    deviation = statistics.median(abs(other - median) for other in past)
    return value > median + factor * max(deviation, MIN_DEVIATION * median)


def module_with_largest_gradient(model: nn.Module, ranks: Ranks = ALONE, copied: Collection[str] = ()) -> str:
    """The module whose own parameters have the largest gradient norm; `copied` are parameters that another rank
    counts."""
    own: dict[str, float] = {}
    for name, p in model.named_parameters():
        if p.grad is not None and name not in copied:
            module = name.rpartition(".")[0]
            own[module] = own.get(module, 0.0) + float(local_tensor(p.grad).double().square().sum())
    squares: dict[str, float] = {}
    for part in ranks.all_objects(own):
        squares |= {module: squares.get(module, 0.0) + value for module, value in part.items()}
    return max(squares, key=lambda module: squares[module], default="no layer")


@torch.no_grad()
def first_nonfinite_module(model: Transformer, parts: Sequence[Tensor], totals: StepTotals, eos_id: int) -> str:
    """The first module whose output is not finite though its input is, in another forward pass; "" when none is.

    Embedding and head are used through their weights and are no modules here.
    """
    names: list[str] = []

    def examine(name: str, inputs: Any, output: Any) -> None:
        if not names and not _is_finite(output) and _is_finite(inputs):
            names.append(name)

    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: examine(name, inputs, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        for part_BW in parts:
            compute_losses(model, part_BW.to(model.embed_tokens.weight.device), totals, eos_id)
            if names:
                return names[0]
    finally:
        for handle in handles:
            handle.remove()
    return ""


def _locate_nonfinite(
    run: Run, parts: Sequence[Tensor], totals: StepTotals, losses_are_finite: bool
) -> tuple[str, str]:
    """(layer, clause) of what is not finite: a layer's output, a weight, a gradient, or the norm of them all."""
    model = run.model
    module = first_nonfinite_module(model, parts, totals, run.tokenizer.eos_id)
    tensor = _first_nonfinite_tensor(model)
    if module or tensor:
        layer = module or tensor.rpartition(".")[0]
        cause = f", and {tensor} holds such values" if tensor else ""
        return layer, f"{layer} is the first layer whose output is not finite{cause}"
    if not losses_are_finite:
        return "lm_head", "every layer's output is finite, so it is the logits of lm_head that are not"
    for name, p in reversed(list(model.named_parameters())):  # in the order of the backward pass
        if p.grad is not None and not p.grad.isfinite().all():
            return name.rpartition(".")[0], f"the gradient of {name} is not finite, though every layer's output is"
    layer = module_with_largest_gradient(model)
    return layer, f"the norm is beyond float32, the largest gradient in {layer}"


def _locate_in_shards(
    run: Run, parts: Sequence[Tensor], totals: StepTotals, losses_are_finite: bool
) -> tuple[str, str]:
    """As `_locate_nonfinite`, with the rank that has it, from weights and gradients alone: another forward pass would
    need every rank to reach the same module."""
    gradients = ((name, p.grad) for name, p in reversed(list(run.model.named_parameters())) if p.grad is not None)
    gradient = next((name for name, grad in gradients if not local_tensor(grad).isfinite().all()), "")
    of_ranks = run.ranks.all_objects((_first_nonfinite_tensor(run.model), gradient))
    for index, kind in enumerate(("", "the gradient of ")):
        for rank, names in enumerate(of_ranks):
            if names[index]:
                return names[index].rpartition(".")[0], f"{kind}{names[index]} is not finite on rank {rank}"
    layer = module_with_largest_gradient(run.model, run.ranks, run.optimizer.copied)
    return layer, f"every weight and gradient is finite; the largest gradient is in {layer}"


def _first_nonfinite_tensor(model: nn.Module) -> str:
    """The first weight or router bias of this rank that is not finite; "" when all are."""
    tensors = ((name, local_tensor(tensor)) for name, tensor in model.state_dict().items())
    return next((name for name, tensor in tensors if not tensor.isfinite().all()), "")


def _biases_are_finite(model: Transformer) -> bool:
    """Whether every router's bias is finite: with one that is not, its expert is always selected, and no loss shows
    it."""
    biases = [moe.gate.e_score_correction_bias for _, moe in model.moe_layers()]
    present = [bias_E for bias_E in biases if bias_E is not None]
    return not present or bool(torch.stack(present).isfinite().all())


def _is_finite(value: Any) -> bool:
    """Whether every tensor in a module's input or output is: tuples, and the router's decision."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if is_dataclass(value):
        return all(map(_is_finite, vars(value).values()))
    return not isinstance(value, tuple | list) or all(map(_is_finite, value))
