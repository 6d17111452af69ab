"""What each device of a training run holds and sends, for sizes of [parallel], and which sizes fit a stated device.

Memory is that of soli/plan/memory.py, shared as soli/parallel does: states over all ranks of a stage, one block's
parameters gathered at a time (fp32, with the next block's, which FSDP2 prefetches) or all of them
(parallel.keep_gathered), embedding and head gathered throughout. Bytes sent are those of ring collectives, per device
and step at the full batch; rows are taken to be spread evenly over the experts, as balance keeps them. Pipeline stages
are planned (1F1B) though not trained yet.

The range of MFU: products alone reach PRODUCT_SHARE of the peak; the upper end hides all communication behind them, the
lower end none. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from soli.analysis.parameters import EMBEDDING, HEAD, ROUTED, mtp_weights, weights
from soli.errors import SoliError
from soli.plan.memory import plan_memory
from soli.plan.training import RECOMPUTATION
from soli.sections import suggest
from soli.train.settings import TrainSettings

PRODUCT_SHARE = 0.5  # of the peak, in matrix products between norms and gates; assumed, not measured
MARGIN = 0.9  # of a device's memory: the allocator's fragments, the communication library's buffers
MASTER = 4  # bytes of a parameter that is gathered, and of its gradient


@dataclass(frozen=True)
class DeviceKind:
    """A device as its vendor states it; `link` between machines, per device (arXiv 2412.19437, 3.1, for the H800)."""

    name: str
    memory: float  # bytes
    tflops: float  # peak in bf16
    link: float  # bytes per second in one direction


DEVICES = {
    kind.name: kind
    for kind in (
        DeviceKind("a100", 80e9, 312, 25e9),
        DeviceKind("h800", 80e9, 989, 50e9),
        DeviceKind("h100", 80e9, 989, 50e9),
        DeviceKind("h200", 141e9, 989, 50e9),
        DeviceKind("b200", 180e9, 2250, 50e9),
    )
}


@dataclass(frozen=True)
class MeshSizes:
    """How devices share a run; ranks of a stage are data x expert x replicate."""

    data: int
    expert: int
    pipeline: int = 1
    replicate: int = 1
    keep_gathered: bool = False

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
        sizes += f" x pipeline {self.pipeline}" if self.pipeline > 1 else ""
        sizes += f" x replicate {self.replicate}" if self.replicate > 1 else ""
        return sizes + (", parameters kept gathered for a step" if self.keep_gathered else "")


@dataclass(frozen=True)
class MeshPlan:
    """One device's part of a step. Bytes; `mfu` and `gpu_hours` from the worst to the best case."""

    sizes: MeshSizes
    device: str
    recomputes: bool  # run.activation_checkpointing
    memory: dict[str, int]  # by part, at the peak
    traffic: dict[str, int]  # by kind, in a step
    bubble: float  # share of a step in which a device waits for other stages
    seconds: tuple[float, float]  # of a step
    mfu: tuple[float, float]
    gpu_hours: tuple[float, float]
    fits: bool

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def find_device(name: str) -> DeviceKind:
    """A device by name; SoliError for one that is not in the table."""
    if name not in DEVICES:
        raise SoliError(f"--device {name} is not known; {suggest(name, DEVICES)}")
    return DEVICES[name]


def plan_mesh(
    settings: TrainSettings, sizes: MeshSizes, device: DeviceKind, precision: str, operations: float
) -> MeshPlan:
    """The plan of pretraining on `sizes`; `operations` are the FLOPs of the whole run."""
    load = _Load(settings, sizes, precision)
    traffic = load.traffic()
    bubble = (sizes.pipeline - 1) / (load.passes + sizes.pipeline - 1)
    devices = sizes.ranks * sizes.pipeline
    tokens = settings.schedule.batch_sequences * settings.schedule.sequence_length
    flops = settings.flops(settings.total_tokens, tokens, settings.schedule.sequence_length)
    recomputes = settings.run.activation_checkpointing
    passes = RECOMPUTATION if recomputes else 1
    compute = passes * flops / (devices * PRODUCT_SHARE * device.tflops * 1e12) / (1 - bubble)
    sending = sum(traffic.values()) / device.link
    seconds = (compute + sending, max(compute, sending))
    worst, best = (flops / (second * devices * device.tflops * 1e12) for second in seconds)
    memory = load.memory()
    return MeshPlan(
        sizes=sizes,
        device=device.name,
        recomputes=recomputes,
        memory=memory,
        traffic=traffic,
        bubble=bubble,
        seconds=seconds,
        mfu=(worst, best),
        gpu_hours=(_gpu_hours(operations, worst, device), _gpu_hours(operations, best, device)),
        fits=sum(memory.values()) <= MARGIN * device.memory,
    )


def propose_mesh(
    settings: TrainSettings, devices: int, device: DeviceKind, precision: str, operations: float
) -> MeshPlan | None:
    """The mesh of `devices` that fits and takes the shortest step, on average of its range, with activations kept or
    recomputed; where none fits, that of the least memory; None where no sizes divide experts and batch."""
    recomputing = replace(settings, run=replace(settings.run, activation_checkpointing=True))
    plans = [
        plan_mesh(options, sizes, device, precision, operations)
        for sizes in _candidates(settings, devices)
        for options in {settings.run.activation_checkpointing: settings, True: recomputing}.values()
    ]
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: sum(plan.seconds))
    return min(plans, key=lambda plan: plan.total, default=None)


def _candidates(settings: TrainSettings, devices: int) -> Iterator[MeshSizes]:
    """Every mesh of whole sizes; stages of at least two layers, at most 16."""
    schedule, config = settings.schedule, settings.model
    experts = config.n_routed_experts or 1
    for pipeline in (n for n in range(1, 17) if devices % n == 0 and 2 * n <= max(2, config.num_hidden_layers)):
        ranks = devices // pipeline
        batches = (schedule.batch_sequences, schedule.batch_sequences_start or ranks)
        if any(sequences % ranks for sequences in batches):
            continue
        for expert in (n for n in range(1, experts + 1) if experts % n == 0 and ranks % n == 0):
            for keep_gathered in (False, True):
                yield MeshSizes(ranks // expert, expert, pipeline, keep_gathered=keep_gathered)


def _gpu_hours(operations: float, mfu: float, device: DeviceKind) -> float:
    return operations / (mfu * device.tflops * 1e12) / 3600


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
        last = ends[HEAD] + mtp
        self.ends = sum(ends.values()) + mtp if stages == 1 else max(ends[EMBEDDING], last)
        self.gathered_ends = sum(ends.values()) if stages == 1 else max(ends.values())
        self.parameters = sum(w.total for w in main) + mtp
        self.passes = max(1, settings.schedule.batch_sequences // sizes.ranks // settings.run.micro_sequences)
        self.tokens = settings.run.micro_sequences * settings.schedule.sequence_length  # of a micro-batch

    @property
    def own_experts(self) -> float:
        """Parameters of the experts that a device computes in its stage."""
        return self.routed * self.share / self.sizes.expert

    def memory(self) -> dict[str, int]:
        settings, sizes, config = self.settings, self.sizes, self.settings.model
        base = plan_memory(settings, self.precision, "cuda", sizes.sharing * sizes.pipeline)
        stage = self.share * (self.dense + self.routed) + self.ends
        imbalance = stage * sizes.pipeline / self.parameters
        block = self.dense / self.layers + self.routed / max(1, config.num_moe_layers) / sizes.expert
        is_sharded = sizes.sharing > 1
        gathered = 3 * block  # this one, the next, this one's gradients
        if sizes.keep_gathered:
            gathered = 2 * (self.dense * self.share + self.own_experts)
        head = MASTER * (1 + config.num_nextn_predict_layers) * config.vocab_size * config.hidden_size
        in_flight = min(sizes.pipeline, self.passes)
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
        shards = MASTER * (self.share * (self.dense + self.routed) + self.ends) / sizes.sharing
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
