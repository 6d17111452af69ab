"""What each device of a training run holds and sends, for sizes of [parallel], and which sizes fit a stated device.

Memory is that of soli/plan/memory.py, shared as soli/parallel does: states over all ranks of a stage, one block's
parameters gathered at a time (fp32, with the next block's, which FSDP2 prefetches) or all of them
(parallel.keep_gathered), embedding and head gathered throughout. Bytes sent are those of ring collectives, per device
and step at the full batch; rows are taken to be spread evenly over the experts, as balance keeps them. Pipeline stages
are planned (1F1B) though not trained yet.

Three step times: the `best`, each kernel at its own rate and all communication hidden; the `expected`, in which a step
is as far from that as the paper's was, communication hidden at the price of multiprocessors (step_time.py); the worst,
no communication hidden, as soli/parallel sends it. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from soli.analysis.parameters import EMBEDDING, HEAD, ROUTED, mtp_weights, weights
from soli.plan.devices import DEVICES, MACHINE, DeviceKind
from soli.plan.memory import plan_memory, saved_per_token
from soli.plan.step_time import (
    HIDING,
    WHOLE_STEP,
    TokenWork,
    bubble_of,
    micro_batches_in_flight,
    seconds_of_token,
    up_projections,
)
from soli.train.settings import TrainSettings

MARGIN = 0.9  # of a device's memory: the allocator's fragments, the communication library's buffers
MASTER = 4  # bytes of a parameter that is gathered, and of its gradient


@dataclass(frozen=True)
class MeshSizes:
    """How devices share a run; ranks of a stage are data x expert x replicate."""

    data: int
    expert: int
    pipeline: int = 1
    replicate: int = 1
    keep_gathered: bool = False
    schedule: str = "1F1B"  # of the pipeline

    @property
    def sharing(self) -> int:
        """Ranks over which a stage's states are sharded."""
        return self.data * self.expert

    @property
    def ranks(self) -> int:
        """Data-parallel ranks of a stage."""
        return self.sharing * self.replicate

    def __str__(self) -> str:
        sizes = f"data {self.data} x expert {self.expert}"
        sizes += f" x pipeline {self.pipeline} ({self.schedule})" if self.pipeline > 1 else ""
        sizes += f" x replicate {self.replicate}" if self.replicate > 1 else ""
        return sizes + (", parameters kept gathered for a step" if self.keep_gathered else "")


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
) -> MeshPlan:
    """The plan of pretraining on `sizes`; `operations` are the FLOPs of the whole run. `repeated`: the share of a
    forward pass that the backward pass computes again, by default what run.activation_checkpointing repeats."""
    load = _Load(settings, sizes, precision)
    recomputes = settings.run.activation_checkpointing
    bubble = bubble_of(sizes.schedule, sizes.pipeline, load.passes)
    computing = load.computing(device, float(recomputes) if repeated is None else repeated) / (1 - bubble)
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


def papers_gpu_hours(settings: TrainSettings) -> float:
    """The expected GPU-hours of pretraining as the paper ran it (3.2): 2,048 H800, 16 stages, experts over 64 ranks,
    FP8, norms and up-projections recomputed. Its hours calibrate the plan, so this must be close to them."""
    schedule = settings.schedule
    operations = settings.flops(0, settings.total_tokens, schedule.sequence_length)
    sizes = MeshSizes(2, 64, 16, keep_gathered=True, schedule="DualPipeV")
    repeated = up_projections(settings.model, schedule.sequence_length)
    return plan_mesh(settings, sizes, DEVICES["h800"], "fp8", operations, repeated).expected_gpu_hours


def propose_mesh(
    settings: TrainSettings, devices: int, device: DeviceKind, precision: str, operations: float
) -> MeshPlan | None:
    """The mesh of `devices` that fits and takes the shortest step, expected and worst case added, with activations kept
    or recomputed; where none fits, that of the least memory; None where no sizes divide experts and batch."""
    recomputing = _recomputing(settings)
    plans = [
        plan_mesh(options, sizes, device, precision, operations)
        for sizes in _candidates(settings, devices)
        for options in {settings.run.activation_checkpointing: settings, True: recomputing}.values()
    ]
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: plan.expected_seconds + plan.seconds[0])
    return min(plans, key=lambda plan: plan.total, default=None)


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
        micro_batches = schedule.batch_sequences // ranks // settings.run.micro_sequences
        for expert in (n for n in range(1, experts + 1) if experts % n == 0 and ranks % n == 0):
            for keep_gathered, name in product((False, True), _schedules(pipeline, micro_batches)):
                yield MeshSizes(ranks // expert, expert, pipeline, keep_gathered=keep_gathered, schedule=name)


def _schedules(pipeline: int, micro_batches: int) -> list[str]:
    """Schedules that take so many micro-batches, of those that can be combined with shards."""
    if pipeline > 1 and micro_batches >= pipeline and micro_batches % (micro_batches // pipeline) == 0:
        return ["1F1B", "Interleaved1F1B"]
    return ["1F1B"]


class _Load:
    """Memory and traffic of the most loaded stage's device."""

    def __init__(self, settings: TrainSettings, sizes: MeshSizes, precision: str) -> None:
        config = settings.model
        self.settings, self.sizes, self.precision = settings, sizes, precision
        self.width = 4 if precision == "fp32" else 2
        self.layers, stages = config.num_hidden_layers, sizes.pipeline
        self.share = ceil(self.layers / stages) / self.layers  # of the blocks, in one stage
        main, modules = weights(config), mtp_weights(config)
        ends = {name: sum(w.total for w in main if w.component == name) for name in (EMBEDDING, HEAD)}
        self.routed = sum(w.total for w in main if w.component == ROUTED)
        self.dense = sum(w.total for w in main) - self.routed - sum(ends.values())
        mtp = sum(w.total for w in modules)
        self.mtp_routed = sum(w.total for w in modules if w.component == ROUTED)
        last = ends[HEAD] + mtp - self.mtp_routed
        self.ends = sum(ends.values()) + last - ends[HEAD] if stages == 1 else max(ends[EMBEDDING], last)
        self.gathered_ends = sum(ends.values()) if stages == 1 else max(ends.values())
        self.parameters = sum(w.total for w in main) + mtp
        self.passes = max(1, settings.schedule.batch_sequences // sizes.ranks // settings.run.micro_sequences)
        self.tokens = settings.run.micro_sequences * settings.schedule.sequence_length  # of a micro-batch
        self.batch_tokens = settings.schedule.batch_sequences * settings.schedule.sequence_length

    @property
    def stage_experts(self) -> float:
        """Parameters of the routed experts of the last stage."""
        return self.routed * self.share + self.mtp_routed

    @property
    def own_experts(self) -> float:
        """Parameters of the experts that a device computes in its stage."""
        return self.stage_experts / self.sizes.expert

    @property
    def flops(self) -> int:
        """Of a step, on all devices."""
        settings = self.settings
        return settings.flops(settings.total_tokens, self.batch_tokens, settings.schedule.sequence_length)

    def computing(self, device: DeviceKind, repeated: float) -> float:
        """Seconds of a device's computation in a step, each kernel at its own rate."""
        length = self.settings.schedule.sequence_length
        saved = saved_per_token(self.settings.model, self.precision, "cuda", length)
        work = TokenWork.of(self.settings.model, length, saved)
        tokens = self.batch_tokens / (self.sizes.ranks * self.sizes.pipeline)
        return tokens * seconds_of_token(work, device, self.precision, repeated)

    def sending(self, device: DeviceKind) -> float:
        """Seconds in which a device sends what it sends in a step, if it does nothing else. Ranks that differ in
        `expert` alone are neighbours, then those that differ in `data`, then the stages."""
        sizes, traffic = self.sizes, self.traffic()

        def rate(ranks: int) -> float:
            return device.neighbour_link if ranks <= MACHINE else device.link

        own_machine = min(sizes.expert, MACHINE) - 1
        rows = traffic.pop("tokens to experts", 0) / max(1, sizes.expert - 1)
        seconds = rows * (own_machine / device.neighbour_link + (sizes.expert - 1 - own_machine) / device.link)
        seconds += traffic.pop("adding replicas", 0) / rate(sizes.ranks)
        seconds += traffic.pop("between stages", 0) / rate(sizes.ranks * sizes.pipeline)
        return seconds + sum(traffic.values()) / rate(sizes.sharing)

    def memory(self) -> dict[str, int]:
        settings, sizes, config = self.settings, self.sizes, self.settings.model
        base = plan_memory(settings, self.precision, "cuda", sizes.sharing * sizes.pipeline)
        stage = self.share * self.dense + self.stage_experts + self.ends
        imbalance = stage * sizes.pipeline / self.parameters
        block = self.dense / self.layers + self.routed / max(1, config.num_moe_layers) / sizes.expert
        is_sharded = sizes.sharing > 1
        gathered = 3 * block  # this one, the next, this one's gradients
        if sizes.keep_gathered:
            gathered = 2 * (self.dense * self.share + self.own_experts)
        head = MASTER * (1 + config.num_nextn_predict_layers) * config.vocab_size * config.hidden_size
        in_flight = micro_batches_in_flight(sizes.schedule, sizes.pipeline, self.passes)
        parts = {
            "weights": base.weights * imbalance,
            "gradients": base.gradients * imbalance,
            "moments": base.moments * imbalance,
            "gathered blocks": MASTER * gathered if is_sharded else 0,
            "embedding and head": 2 * MASTER * self.gathered_ends if is_sharded else 0,  # and their gradients
            "compute copies": 0 if self.precision == "fp32" else self.width * block,
            "activations": (base.activations - head) * self.share * in_flight + head,
            "dispatch": 4 * self.tokens * config.num_experts_per_tok * config.hidden_size * self.width
            if sizes.expert > 1
            else 0,
            "largest operation": base.transient,
        }
        return {name: round(size) for name, size in parts.items() if size}

    def traffic(self) -> dict[str, int]:
        """Bytes that a device sends in a step, all micro-batches together."""
        sizes, config = self.sizes, self.settings.model
        dense = _ring(sizes.sharing) * MASTER * self.dense * self.share
        ends = _ring(sizes.sharing) * MASTER * self.ends
        experts = _ring(sizes.data) * MASTER * self.own_experts
        shards = MASTER * (self.share * self.dense + self.stage_experts + self.ends) / sizes.sharing
        mixtures = (config.num_moe_layers + config.num_nextn_predict_layers) * self.share
        row = config.hidden_size * self.width
        exchanges = 6 if self.settings.run.activation_checkpointing else 4  # there and back, forward and backward
        rows = self.tokens * config.num_experts_per_tok * _ring(sizes.expert) * row * exchanges * mixtures
        times = 1 if sizes.keep_gathered else self.passes
        kinds = {
            "gathering parameters": times * ((1 if sizes.keep_gathered else 2) * (dense + experts) + ends),
            "adding gradients": times * (dense + experts + ends),
            "adding replicas": times * 2 * _ring(sizes.replicate) * shards,
            "tokens to experts": self.passes * rows if config.n_routed_experts else 0,
            "between stages": self.passes * 2 * self.tokens * row if sizes.pipeline > 1 else 0,
        }
        return {name: round(size) for name, size in kinds.items() if size}


def _ring(ranks: int) -> float:
    """The share of the whole tensor that each of `ranks` sends in a ring all-gather or reduce-scatter."""
    return (ranks - 1) / ranks
