"""What each device of a training run holds and sends, and how long a step takes, for sizes of [parallel].

Memory is that of soli/plan/memory.py, shared as soli/parallel does: states over all ranks of a stage, one block's
parameters gathered at a time (fp32, with the next block's, which FSDP2 prefetches) or all of them
(parallel.keep_gathered), embedding and head gathered throughout. Bytes sent are those of ring collectives, per device
and step at the full batch; rows are taken to be spread evenly over the experts, as balance keeps them.

Three step times: the `best`, each kernel at its own rate and all communication hidden; the `expected`, as Soli's
trainer computes, which hides the gathering of a block's parameters behind the block before, at the price of
multiprocessors, and nothing else; the worst, no communication hidden (step_time.py). No torch.
"""

from dataclasses import dataclass

from soli.plan.device_load import DISPATCH, DeviceLoad, imbalance
from soli.plan.devices import DEVICES, DeviceKind
from soli.plan.mesh_sizes import MeshSizes
from soli.plan.step_time import HIDING, WHOLE_STEP, bubble_of, up_projections, waiting
from soli.train.settings import TrainSettings

MARGIN = 0.9  # of a device's memory: the allocator's fragments, the communication library's buffers


@dataclass(frozen=True)
class Trainer:
    """How a trainer computes a mesh: by default as Soli does. `repeated`: the share of a forward pass that the backward
    pass computes again; None: what run.activation_checkpointing repeats."""

    repeated: float | None = None
    stages_are_equal: bool = False
    hides_all: bool = False  # communication of one micro-batch behind the computation of another


SOLI = Trainer()


@dataclass(frozen=True)
class MeshPlan:
    """One device's part of a step. Bytes; `seconds`, `mfu` and `gpu_hours` from the worst to the best case."""

    sizes: MeshSizes
    device: str
    precision: str
    micro_sequences: int
    recomputes: bool  # run.activation_checkpointing
    memory: dict[str, int]  # by part, at the peak
    traffic: dict[str, int]  # by kind, in a step
    bubble: float  # share of a step in which a device waits for other stages
    seconds: tuple[float, float]  # of a step
    mfu: tuple[float, float]
    gpu_hours: tuple[float, float]
    expected_seconds: float
    expected_mfu: float
    expected_gpu_hours: float
    hours_by_cause: dict[str, float]  # the expected ones
    fits: bool

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def plan_mesh(
    settings: TrainSettings,
    sizes: MeshSizes,
    device: DeviceKind,
    precision: str,
    operations: float,
    trainer: Trainer = SOLI,
) -> MeshPlan:
    """The plan of pretraining on `sizes`; `operations` are the FLOPs of the whole run."""
    load = DeviceLoad(settings, sizes, precision)
    memory = load.memory()
    causes = _seconds_by_cause(load, device, trainer)
    expected = sum(causes.values())
    best, worst = _bounds(load, device, trainer)

    def mfu(seconds: float) -> float:
        return load.flops / (seconds * sizes.ranks * sizes.pipeline * device.tflops * 1e12)

    def gpu_hours(seconds: float) -> float:
        return operations / (mfu(seconds) * device.tflops * 1e12) / 3600

    return MeshPlan(
        sizes=sizes,
        device=device.name,
        precision=precision,
        micro_sequences=settings.run.micro_sequences,
        recomputes=settings.run.activation_checkpointing,
        memory=memory,
        traffic=load.traffic(),
        bubble=bubble_of(sizes.schedule, sizes.pipeline, load.passes),
        seconds=(worst, best),
        mfu=(mfu(worst), mfu(best)),
        gpu_hours=(gpu_hours(worst), gpu_hours(best)),
        expected_seconds=expected,
        expected_mfu=mfu(expected),
        expected_gpu_hours=gpu_hours(expected),
        hours_by_cause={cause: gpu_hours(seconds) for cause, seconds in causes.items() if seconds},
        fits=sum(memory.values()) <= MARGIN * device.memory,
    )


def _seconds_by_cause(load: DeviceLoad, device: DeviceKind, trainer: Trainer) -> dict[str, float]:
    """The expected seconds of a step."""
    sizes = load.sizes
    arithmetic = load.computing(device, 0.0) / WHOLE_STEP
    recomputing = load.computing(device, _repeated(load, trainer)) / WHOLE_STEP - arithmetic
    computing = arithmetic + recomputing
    waits = waiting(sizes.schedule, sizes.pipeline, load.passes)
    if trainer.hides_all:
        bubble = waits * computing
        step = max((computing + bubble) / HIDING, sum(load.sending(device).values()))
        hidden = step - computing - bubble
        return {
            "arithmetic": arithmetic, "recomputing": recomputing, "uneven stages": 0.0, "bubble": bubble,
            DISPATCH: hidden, "other messages": 0.0,
        }  # fmt: skip
    sends = [load.sending(device, rank) for rank in load.ranks]
    dispatch = [kinds.get(DISPATCH, 0.0) for kinds in sends]
    share = [1.0 if trainer.stages_are_equal else rank.work * sizes.pipeline for rank in load.ranks]
    ranks = [computing * work + rows for work, rows in zip(share, dispatch, strict=True)]
    slowest = max(range(len(ranks)), key=ranks.__getitem__)
    mean = sum(ranks) / len(ranks)
    others = sends[slowest]
    shards = sum(seconds for kind, seconds in others.items() if kind not in (DISPATCH, "between stages"))
    if not sizes.keep_gathered:  # FSDP2 gathers the next block's while it computes one
        shards = max(shards * (1 - HIDING), shards - HIDING * computing)
    return {
        "arithmetic": arithmetic,
        "recomputing": recomputing,
        "uneven stages": ranks[slowest] - mean,
        "bubble": waits * mean,
        DISPATCH: sum(dispatch) / len(dispatch),
        "other messages": shards + others.get("between stages", 0.0),
    }


def _bounds(load: DeviceLoad, device: DeviceKind, trainer: Trainer) -> tuple[float, float]:
    """Seconds of a step where all communication is hidden and each kernel reaches its own rate, and where none is."""
    sizes = load.sizes
    waits = waiting(sizes.schedule, sizes.pipeline, load.passes)
    uneven = 1.0 if trainer.stages_are_equal else imbalance(load.settings.model, sizes)
    computing = load.computing(device, _repeated(load, trainer)) * (uneven + waits)
    sending = sum(load.sending(device).values())
    return max(computing, sending), computing / WHOLE_STEP + (1 + waits) * sending


def _repeated(load: DeviceLoad, trainer: Trainer) -> float:
    return float(load.settings.run.activation_checkpointing) if trainer.repeated is None else trainer.repeated


def papers_plan(settings: TrainSettings) -> MeshPlan:
    """The plan of pretraining as the paper ran it (3.2): 2,048 H800, 16 stages of equal work, experts over 64 ranks,
    FP8, norms and up-projections recomputed, communication hidden. Its hours calibrate the plan, so these must be close
    to them. Its memory is not what is planned: activations are stored as Soli stores them."""
    sizes = MeshSizes(2, 64, 16, keep_gathered=True, schedule="DualPipeV")
    trainer = Trainer(up_projections(settings.model, settings.schedule.sequence_length), True, True)
    return plan_mesh(settings, sizes, DEVICES["h800"], "fp8", pretraining_flops(settings), trainer)


def pretraining_flops(settings: TrainSettings) -> int:
    """Of pretraining, which is what a mesh is planned for."""
    return settings.flops(0, settings.schedule.total_tokens, settings.schedule.sequence_length)
