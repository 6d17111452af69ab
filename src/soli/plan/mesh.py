"""What each device of a training run holds and sends, for sizes of [parallel], and which sizes fit a stated device.

Memory is that of soli/plan/memory.py, shared as soli/parallel does: states over all ranks of a stage, one block's
parameters gathered at a time (fp32, with the next block's, which FSDP2 prefetches) or all of them
(parallel.keep_gathered), embedding and head gathered throughout. Bytes sent are those of ring collectives, per device
and step at the full batch; rows are taken to be spread evenly over the experts, as balance keeps them.

Three step times: the `best`, each kernel at its own rate and all communication hidden; the `expected`, in which a step
is as far from that as the paper's was, communication hidden at the price of multiprocessors (step_time.py); the worst,
no communication hidden, as soli/parallel sends it. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from soli.errors import SoliError
from soli.parallel.stages import SCHEDULES, micro_batch_size
from soli.plan.device_load import DeviceLoad, imbalance
from soli.plan.devices import DEVICES, DeviceKind
from soli.plan.mesh_sizes import MeshSizes
from soli.plan.step_time import HIDING, WHOLE_STEP, bubble_of, up_projections
from soli.train.settings import TrainSettings, as_recipe, read_settings

MARGIN = 0.9  # of a device's memory: the allocator's fragments, the communication library's buffers


@dataclass(frozen=True)
class MeshPlan:
    """One device's part of a step. Bytes; `seconds`, `mfu` and `gpu_hours` from the worst to the best case."""

    sizes: MeshSizes
    device: str
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
    repeated: float | None = None,
    stages_are_equal: bool = False,
) -> MeshPlan:
    """The plan of pretraining on `sizes`; `operations` are the FLOPs of the whole run. `repeated`: the share of a
    forward pass that the backward pass computes again, by default what run.activation_checkpointing repeats."""
    load = DeviceLoad(settings, sizes, precision)
    recomputes = settings.run.activation_checkpointing
    bubble = bubble_of(sizes.schedule, sizes.pipeline, load.passes)
    computing = load.computing(device, float(recomputes) if repeated is None else repeated) / (1 - bubble)
    computing *= 1.0 if stages_are_equal else imbalance(settings.model, sizes)
    sending = load.sending(device)
    best = max(computing, sending)
    worst = computing / WHOLE_STEP + sending
    expected = min(worst, max(computing / WHOLE_STEP / HIDING, sending))
    memory = load.memory()

    def mfu(seconds: float) -> float:
        return load.flops / (seconds * sizes.ranks * sizes.pipeline * device.tflops * 1e12)

    def gpu_hours(seconds: float) -> float:
        return operations / (mfu(seconds) * device.tflops * 1e12) / 3600

    return MeshPlan(
        sizes=sizes,
        device=device.name,
        recomputes=recomputes,
        memory=memory,
        traffic=load.traffic(),
        bubble=bubble,
        seconds=(worst, best),
        mfu=(mfu(worst), mfu(best)),
        gpu_hours=(gpu_hours(worst), gpu_hours(best)),
        expected_seconds=expected,
        expected_mfu=mfu(expected),
        expected_gpu_hours=gpu_hours(expected),
        fits=sum(memory.values()) <= MARGIN * device.memory,
    )


def papers_plan(settings: TrainSettings) -> MeshPlan:
    """The plan of pretraining as the paper ran it (3.2): 2,048 H800, 16 stages of equal work, experts over 64 ranks,
    FP8, norms and up-projections recomputed. Its hours calibrate the plan, so these must be close to them. Its memory
    is not what is planned: activations are stored as Soli stores them."""
    schedule = settings.schedule
    operations = settings.flops(0, settings.total_tokens, schedule.sequence_length)
    sizes = MeshSizes(2, 64, 16, keep_gathered=True, schedule="DualPipeV")
    repeated = up_projections(settings.model, schedule.sequence_length)
    return plan_mesh(settings, sizes, DEVICES["h800"], "fp8", operations, repeated, True)


def propose_mesh(
    settings: TrainSettings, devices: int, device: DeviceKind, precision: str, operations: float
) -> MeshPlan | None:
    """The mesh of `devices` that fits and takes the shortest step, as expected and then in the worst case, activations
    kept or recomputed; the first such that the trainer takes for this recipe, if there is one. Where none fits, that of
    the least memory; None where no sizes divide experts and batch."""
    recomputing = _recomputing(settings)
    plans = [
        plan_mesh(options, sizes, device, precision, operations)
        for sizes in _candidates(settings, devices)
        for options in {settings.run.activation_checkpointing: settings, True: recomputing}.values()
    ]
    fitting = sorted((plan for plan in plans if plan.fits), key=lambda plan: (plan.expected_seconds, plan.seconds[0]))
    accepted = (plan for plan in fitting if refusal(settings, plan.sizes) is None)
    if fitting:
        return next(accepted, fitting[0])
    return min(plans, key=lambda plan: plan.total, default=None)


def refusal(settings: TrainSettings, sizes: MeshSizes) -> str | None:
    """Why the trainer would refuse the recipe on this mesh, where it would."""
    try:
        read_settings(as_recipe(settings, {}) | {"parallel": vars(sizes)})
    except SoliError as error:
        return str(error)
    return None


def as_planned(settings: TrainSettings, plan: MeshPlan) -> TrainSettings:
    """The settings with the run option that a proposed plan has changed."""
    return _recomputing(settings) if plan.recomputes else settings


def _recomputing(settings: TrainSettings) -> TrainSettings:
    return replace(settings, run=replace(settings.run, activation_checkpointing=True))


def _candidates(settings: TrainSettings, devices: int) -> Iterator[MeshSizes]:
    """Every mesh of whole sizes; stages of at least two layers, at most 16."""
    schedule, config = settings.schedule, settings.model
    experts = config.n_routed_experts or 1
    for pipeline in (n for n in range(1, 17) if devices % n == 0 and 2 * n <= max(2, config.num_hidden_layers)):
        ranks = devices // pipeline
        batches = (schedule.batch_sequences, schedule.batch_sequences_start or ranks)
        if any(sequences % ranks for sequences in batches):
            continue
        shares = [sequences // ranks for sequences in batches]
        for expert in (n for n in range(1, experts + 1) if experts % n == 0 and ranks % n == 0):
            if pipeline == 1:
                yield from (MeshSizes(ranks // expert, expert, keep_gathered=whole) for whole in (False, True))
            for name in _schedules(settings, pipeline, shares, ranks > 1):
                yield MeshSizes(ranks // expert, expert, pipeline, keep_gathered=True, schedule=name)


def _schedules(settings: TrainSettings, pipeline: int, shares: list[int], is_sharded: bool) -> Iterator[str]:
    """Schedules of a pipeline that take the micro-batches of such shares of a batch."""
    micro = settings.run.micro_sequences
    for name, schedule in SCHEDULES.items():
        has_layers = schedule.stages(pipeline) <= settings.model.num_hidden_layers
        takes_all = all(micro_batch_size(schedule, pipeline, share, micro) == micro for share in shares)
        if pipeline > 1 and has_layers and takes_all and not (schedule.is_v_shaped and is_sharded):
            yield name
