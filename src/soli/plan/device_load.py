"""Memory, traffic and computation of the most loaded device of a mesh.

A rank of a pipeline has the layers that soli/parallel/stages.py gives it; the last one also the head, the MTP modules
and, for these, a copy of the embedding. The rank with the most parameters bounds memory and traffic, the one with the
most work the step. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from soli.analysis.parameters import EMBEDDING, HEAD, ROUTED, mtp_weights, weights
from soli.config import ModelConfig
from soli.parallel.stages import divide_layers, find_schedule, layer_costs
from soli.plan.devices import MACHINE, DeviceKind
from soli.plan.memory import plan_memory, saved_per_token
from soli.plan.mesh_sizes import MeshSizes
from soli.plan.step_time import TokenWork, micro_batches_in_flight, seconds_of_token
from soli.train.settings import TrainSettings

MASTER = 4  # bytes of a parameter that is gathered, and of its gradient


@dataclass(frozen=True)
class StageParameters:
    """Parameters of a pipeline rank, by how they are sharded; `blocks` is its share of all blocks."""

    blocks: float
    mixtures: float  # layers with experts, MTP modules included
    dense: float
    routed: float
    ends: float  # embedding, head, the dense part of MTP modules

    @property
    def total(self) -> float:
        return self.dense + self.routed + self.ends


def rank_parameters(config: ModelConfig, sizes: MeshSizes) -> list[StageParameters]:
    """Of each rank of a pipeline."""
    main, modules = weights(config), mtp_weights(config)
    ends = {name: sum(w.total for w in main if w.component == name) for name in (EMBEDDING, HEAD)}
    routed = sum(w.total for w in main if w.component == ROUTED)
    dense = sum(w.total for w in main) - routed - sum(ends.values())
    module_experts = sum(w.total for w in modules if w.component == ROUTED)
    number = config.num_nextn_predict_layers
    parameters = []
    for layers, is_first, is_last in _layers_of_ranks(config, sizes):
        share = len(layers) / config.num_hidden_layers
        has_embedding = is_first or (is_last and (number or config.tie_word_embeddings))
        own_ends = ends[EMBEDDING] if has_embedding else 0
        own_ends += ends[HEAD] + sum(w.total for w in modules) - module_experts if is_last else 0
        parameters.append(
            StageParameters(
                blocks=share,
                mixtures=share * config.num_moe_layers + (number if is_last else 0),
                dense=share * dense,
                routed=share * routed + (module_experts if is_last else 0),
                ends=own_ends,
            )
        )
    return parameters


@cache
def imbalance(config: ModelConfig, sizes: MeshSizes) -> float:
    """The work of the pipeline rank that has most, over the mean."""
    costs, last = layer_costs(config)
    work = [
        sum(costs[layer] for layer in layers) + (last if is_last else 0)
        for layers, _, is_last in _layers_of_ranks(config, sizes)
    ]
    return max(work) * len(work) / sum(work)


@cache
def _layers_of_ranks(config: ModelConfig, sizes: MeshSizes) -> list[tuple[Sequence[int], bool, bool]]:
    """Layers of each rank of a pipeline, whether it has the first and the last stage."""
    if sizes.pipeline == 1:
        return [(range(config.num_hidden_layers), True, True)]
    schedule = find_schedule(sizes.schedule)
    division = divide_layers(config, schedule.stages(sizes.pipeline))
    ranks = [schedule.stages_of(rank, sizes.pipeline) for rank in range(sizes.pipeline)]
    return [
        ([layer for stage in stages for layer in division[stage]], 0 in stages, len(division) - 1 in stages)
        for stages in ranks
    ]


class DeviceLoad:
    """What the most loaded device, of `kind` cpu or cuda, does and holds in a step."""

    def __init__(self, settings: TrainSettings, sizes: MeshSizes, precision: str, kind: str = "cuda") -> None:
        self.settings, self.sizes, self.precision, self.kind = settings, sizes, precision, kind
        self.width = 4 if precision == "fp32" else 2
        ranks = rank_parameters(settings.model, sizes)
        self.own = max(ranks, key=lambda rank: rank.total)
        self.parameters = sum(w.total for w in (*weights(settings.model), *mtp_weights(settings.model)))
        self.passes = max(1, settings.schedule.batch_sequences // sizes.ranks // settings.run.micro_sequences)
        self.tokens = settings.run.micro_sequences * settings.schedule.sequence_length  # of a micro-batch
        self.batch_tokens = settings.schedule.batch_sequences * settings.schedule.sequence_length

    @property
    def own_experts(self) -> float:
        """Parameters of the experts that a device computes in its stage."""
        return self.own.routed / self.sizes.expert

    @property
    def flops(self) -> int:
        """Of a step, on all devices."""
        settings = self.settings
        return settings.flops(settings.total_tokens, self.batch_tokens, settings.schedule.sequence_length)

    def computing(self, device: DeviceKind, repeated: float) -> float:
        """Seconds of a device's computation in a step, each kernel at its own rate, stages equal."""
        length = self.settings.schedule.sequence_length
        saved = saved_per_token(self.settings.model, self.precision, self.kind, length)
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
        settings, sizes, config, own = self.settings, self.sizes, self.settings.model, self.own
        base = plan_memory(settings, self.precision, self.kind, sizes.sharing * sizes.pipeline)
        above_mean = own.total * sizes.pipeline / self.parameters
        layers = own.blocks * config.num_hidden_layers
        block = own.dense / layers + own.routed / max(1, own.mixtures) / sizes.expert
        is_sharded = sizes.sharing > 1
        gathered = 3 * block  # this one, the next, this one's gradients
        if sizes.keep_gathered:
            gathered = 2 * (own.dense + self.own_experts)
        head = MASTER * (1 + config.num_nextn_predict_layers) * config.vocab_size * config.hidden_size
        in_flight = micro_batches_in_flight(sizes.schedule, sizes.pipeline, self.passes)
        parts = {
            "weights": base.weights * above_mean,
            "gradients": base.gradients * above_mean,
            "moments": base.moments * above_mean,
            "gathered blocks": MASTER * gathered if is_sharded else 0,
            "embedding and head": 2 * MASTER * own.ends if is_sharded else 0,  # and their gradients
            "compute copies": 0 if self.precision == "fp32" else self.width * block,
            "activations": (base.activations - head) * own.blocks * in_flight + head,
            "dispatch": 4 * self.tokens * config.num_experts_per_tok * config.hidden_size * self.width
            if sizes.expert > 1
            else 0,
            "largest operation": base.transient,
        }
        return {name: round(size) for name, size in parts.items() if size}

    def traffic(self) -> dict[str, int]:
        """Bytes that a device sends in a step, all micro-batches together."""
        sizes, config, own = self.sizes, self.settings.model, self.own
        dense = _ring(sizes.sharing) * MASTER * own.dense
        ends = _ring(sizes.sharing) * MASTER * own.ends
        experts = _ring(sizes.data) * MASTER * self.own_experts
        shards = MASTER * own.total / sizes.sharing
        row = config.hidden_size * self.width
        exchanges = 6 if self.settings.run.activation_checkpointing else 4  # there and back, forward and backward
        rows = self.tokens * config.num_experts_per_tok * _ring(sizes.expert) * row * exchanges * own.mixtures
        messages = 2 * find_schedule(sizes.schedule).stages_per_rank  # a hidden state down, its gradient up
        times = 1 if sizes.keep_gathered else self.passes
        kinds = {
            "gathering parameters": times * ((1 if sizes.keep_gathered else 2) * (dense + experts) + ends),
            "adding gradients": times * (dense + experts + ends),
            "adding replicas": times * 2 * _ring(sizes.replicate) * shards,
            "tokens to experts": self.passes * rows if config.n_routed_experts else 0,
            "between stages": self.passes * messages * self.tokens * row if sizes.pipeline > 1 else 0,
        }
        return {name: round(size) for name, size in kinds.items() if size}


def _ring(ranks: int) -> float:
    """The share of the whole tensor that each of `ranks` sends in a ring all-gather or reduce-scatter."""
    return (ranks - 1) / ranks
