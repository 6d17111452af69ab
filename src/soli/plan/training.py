"""What a run needs, from its recipe alone: phases in tokens and steps, FLOPs, memory, GPU-hours.

FLOPs are three forward passes per token (one forward, two backward), causal attention and MTP included. GPU-hours are
FLOPs over the rate that a device sustains: its peak times the model FLOPs utilisation, MFU. Memory:
soli/plan/memory.py. Needs no torch and no data.
"""

from dataclasses import dataclass
from itertools import accumulate

from soli.analysis.parameters import count
from soli.plan.memory import MemoryEstimate, plan_memory
from soli.train.schedule import batch_sequences, learning_rate, steps_before, warmup_end
from soli.train.settings import TrainSettings

PAPER_GPU_HOURS = 2_664_000  # H800, pretraining of DeepSeek-V3 without extension: arXiv 2412.19437, table 1
PAPER_TOKENS, PAPER_PARAMETERS = 14_800_000_000_000, 671_026_419_200  # trained in those hours
# The share of a CPU core's rate on a recipe's largest matrix products that a training step of nano-zh-en reaches:
# medians of 4 rounds after a warm-up, processor time, one thread of an EPYC, torch 2.13. No other shape was measured.
STEP_SHARE = {"bf16": 0.38, "fp32": 0.62}
RECOMPUTATION = 4 / 3  # forward and backward passes with activation checkpointing over those without


@dataclass(frozen=True)
class PlannedPhase:
    """One phase of the run; pairs hold the value of its first step and of its last."""

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
    precision: str  # of activations: the recipe's, bf16 for auto without a device
    memory: MemoryEstimate
    extension_memory: tuple[MemoryEstimate, ...]
    gpu_hours: float
    paper_gpu_hours: int | None  # of the paper, where the recipe is the paper's


def plan_run(
    settings: TrainSettings,
    devices: int,
    mfu: float,
    device_tflops: float,
    precision: str | None = None,
    kind: str = "cuda",
) -> TrainingPlan:
    """The plan on `devices` equal devices of `device_tflops` peak TFLOP/s each, at a utilisation of `mfu`.

    `precision` is the one that `auto` stands for, and `kind` cpu or cuda, where the device is known: memory depends on
    both.
    """
    precision = (precision or "bf16") if settings.run.precision == "auto" else settings.run.precision
    phases = planned_phases(settings)
    main = count(settings.model)
    lengths = [phase.sequence_length for phase in phases]
    tokens = [phase.tokens for phase in phases]
    operations = sum(map(settings.flops, accumulate(tokens, initial=0), tokens, lengths))
    is_papers = main.total == PAPER_PARAMETERS and settings.schedule.total_tokens == PAPER_TOKENS
    return TrainingPlan(
        phases=phases,
        parameters=count(settings.model, mtp=True).total,
        activated=main.activated,
        flops=operations,
        precision=precision,
        memory=plan_memory(settings, precision, kind, devices),
        extension_memory=tuple(
            plan_memory(settings, precision, kind, devices, phase.sequence_length) for phase in settings.extension
        ),
        gpu_hours=operations / (mfu * device_tflops * 1e12) / 3600,
        paper_gpu_hours=PAPER_GPU_HOURS if is_papers else None,
    )


def planned_phases(settings: TrainSettings) -> tuple[PlannedPhase, ...]:
    """Every phase of the run in order: pretraining's, then the extension's."""
    extension = [
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
    return (*_pretraining(settings), *extension)


def hours_here(settings: TrainSettings, operations: int, tflops: float, precision: str) -> float:
    """Hours of `operations` FLOPs on one device that measures `tflops` on matrix products in `precision`."""
    passes = RECOMPUTATION if settings.run.activation_checkpointing else 1.0
    return passes * operations / (STEP_SHARE[precision] * tflops * 1e12) / 3600


def _pretraining(settings: TrainSettings) -> list[PlannedPhase]:
    schedule = settings.schedule
    lengths = [
        ("warm-up", warmup_end(schedule)),
        ("constant", schedule.constant_end - warmup_end(schedule)),
        ("cosine", schedule.cosine_tokens),
        *((f"tail {n}", int(tokens)) for n, (tokens, _) in enumerate(schedule.tails, 1)),
    ]
    phases = []
    start = 0
    for name, tokens in lengths:
        end = start + tokens
        if tokens:
            phases.append(
                PlannedPhase(
                    name=name,
                    tokens=tokens,
                    steps=steps_before(schedule, end) - steps_before(schedule, start),
                    sequence_length=schedule.sequence_length,
                    batch_sequences=(batch_sequences(schedule, start), batch_sequences(schedule, end - 1)),
                    learning_rate=(learning_rate(schedule, start), learning_rate(schedule, end - 1)),
                )
            )
        start = end
    return phases
