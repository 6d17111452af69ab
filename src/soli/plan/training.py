"""What a run would take, from its recipe alone: phases in tokens and steps, FLOPs, memory, GPU-hours.

FLOPs are three forward passes per token (one forward, two backward), MTP and causal attention included. GPU-hours are
FLOPs over what a device sustains: its peak times the model FLOPs utilisation, MFU. Memory: soli/plan/memory.py. Needs
no torch and no data.
"""

from __future__ import annotations

from dataclasses import dataclass

from soli.analysis.parameters import count, training_flops
from soli.plan.memory import MemoryEstimate, plan_memory
from soli.train.schedule import batch_sequences, learning_rate, steps_before, warmup_end
from soli.train.settings import TrainSettings

PAPER_GPU_HOURS = 2_664_000  # H800, pretraining of DeepSeek-V3 without extension: arXiv 2412.19437, table 1
PAPER_TOKENS, PAPER_PARAMETERS = 14_800_000_000_000, 671_026_419_200  # what those hours bought
# Of a CPU core's rate on a recipe's largest matrix products, what a whole training step of nano-zh-en reaches: medians
# of 4 rounds after one left out, processor time, one thread of an EPYC, torch 2.13. Not measured at any other shape.
STEP_SHARE = {"bf16": 0.38, "fp32": 0.62}
RECOMPUTED = 4 / 3  # passes with activation checkpointing over passes without


@dataclass(frozen=True)
class PlannedPhase:
    """One stretch of the run; pairs hold the value of its first step and of its last."""

    name: str
    tokens: int
    steps: int  # that start within it
    sequence_length: int
    batch_sequences: tuple[int, int]
    learning_rate: tuple[float, float]


@dataclass(frozen=True)
class TrainingPlan:
    """The whole run. `flops` of all phases; `memory` of each device in pretraining, then in each extension phase."""

    phases: tuple[PlannedPhase, ...]
    parameters: int  # MTP modules included, as in the memory
    activated: int  # of the main model
    flops: int
    precision: str  # of activations: what the recipe says, bf16 for auto when no device was looked at
    memory: MemoryEstimate
    extension_memory: tuple[MemoryEstimate, ...]
    gpu_hours: float
    paper_gpu_hours: int | None  # where the recipe is the paper's own


def plan_run(
    settings: TrainSettings,
    devices: int,
    mfu: float,
    device_tflops: float,
    precision: str | None = None,
    kind: str = "cuda",
) -> TrainingPlan:
    """The plan on `devices` equal devices of `device_tflops` peak TFLOP/s each, at a utilisation of `mfu`.

    `precision` is what `auto` came to, and `kind` cpu or cuda, where the device is known: memory depends on both.
    """
    wanted = settings.run.precision
    precision = wanted if wanted != "auto" else precision or "bf16"
    phases = planned_phases(settings)
    whole, main = count(settings.model, mtp=True).total, count(settings.model)
    operations = sum(phase.tokens * training_flops(settings.model, phase.sequence_length) for phase in phases)
    papers = main.total == PAPER_PARAMETERS and settings.schedule.total_tokens == PAPER_TOKENS
    return TrainingPlan(
        phases=phases,
        parameters=whole,
        activated=main.activated,
        flops=operations,
        precision=precision,
        memory=plan_memory(settings, precision, kind, devices),
        extension_memory=tuple(
            plan_memory(settings, precision, kind, devices, phase.sequence_length) for phase in settings.extension
        ),
        gpu_hours=operations / (mfu * device_tflops * 1e12) / 3600,
        paper_gpu_hours=PAPER_GPU_HOURS if papers else None,
    )


def planned_phases(settings: TrainSettings) -> tuple[PlannedPhase, ...]:
    """Every stretch of the run in order: pretraining's, then the extension's."""
    return (*_pretraining(settings), *_extension(settings))


def hours_here(settings: TrainSettings, operations: int, tflops: float, precision: str) -> float:
    """Hours of `operations` FLOPs on one device that measures `tflops` on matrix products in `precision`."""
    passes = RECOMPUTED if settings.run.activation_checkpointing else 1.0
    return passes * operations / (STEP_SHARE[precision] * tflops * 1e12) / 3600


def _pretraining(settings: TrainSettings) -> list[PlannedPhase]:
    schedule = settings.schedule
    lengths = [
        ("warm-up", warmup_end(schedule)),
        ("constant", schedule.constant_end - warmup_end(schedule)),
        ("cosine", schedule.cosine_tokens),
        *((f"tail {n}", int(tokens)) for n, (tokens, _) in enumerate(schedule.tails, 1)),
    ]
    phases, start = [], 0
    for name, tokens in lengths:
        end, last = start + tokens, max(start, start + tokens - 1)
        if tokens:
            steps = steps_before(schedule, end) - steps_before(schedule, start)
            batches = (batch_sequences(schedule, start), batch_sequences(schedule, last))
            rates = (learning_rate(schedule, start), learning_rate(schedule, last))
            phases.append(PlannedPhase(name, tokens, steps, schedule.sequence_length, batches, rates))
        start = end
    return phases


def _extension(settings: TrainSettings) -> list[PlannedPhase]:
    return [
        PlannedPhase(
            name=f"extension {n}",
            tokens=phase.total_tokens,
            steps=phase.total_steps,
            sequence_length=phase.sequence_length,
            batch_sequences=(phase.batch_sequences, phase.batch_sequences),
            learning_rate=(phase.learning_rate, phase.learning_rate),
        )
        for n, phase in enumerate(settings.extension, 1)
    ]
