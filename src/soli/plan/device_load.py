"""Memory, traffic and computation of the devices of a mesh.

A rank of a pipeline has the layers that soli/parallel/stages.py gives it; the last one also the head, the MTP modules
and, for these, a copy of the embedding. The rank that holds most bounds memory, the slowest one the step. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from soli.analysis.parameters import DENSE, EMBEDDING, HEAD, ROUTED, ROUTER, SHARED, mtp_weights, weights
from soli.config import ModelConfig
from soli.parallel.stages import divide_layers, find_schedule, layer_costs
from soli.plan.devices import MACHINE, DeviceKind
from soli.plan.memory import MemoryEstimate, head_gradient_bytes, largest_block, plan_memory, saved_per_token
from soli.plan.mesh_sizes import MeshSizes
from soli.plan.step_time import TokenWork, micro_batches_in_flight, seconds_of_token
from soli.train.settings import TrainSettings

MASTER = 4  # bytes of a parameter that is gathered, and of its gradient
DISPATCH = "tokens to experts"


@dataclass(frozen=True)
class StageParameters:
    """Parameters of a pipeline rank, by how they are sharded; `blocks` is its share of all blocks."""

    rank: int
    blocks: float
    mixtures: float  # layers with experts, MTP modules included
    dense: float
    routed: float
    ends: float  # embedding, head, the dense part of MTP modules
    has_head: bool
    work: float  # its share of a token's computation

    @property
    def total(self) -> float:
        return self.dense + self.routed + self.ends


@cache
def rank_parameters(config: ModelConfig, sizes: MeshSizes) -> tuple[StageParameters, ...]:
    """Of each rank of a pipeline."""
    main, modules = weights(config), mtp_weights(config)
    number, mixtures = config.num_nextn_predict_layers, config.num_moe_layers

    def total(*components: str) -> int:
        return sum(w.total for w in main if w.component in components)

    embedding, head, routed = total(EMBEDDING), total(HEAD), total(ROUTED)
    of_mixture = total(SHARED, ROUTER) / max(1, mixtures)
    of_dense = total(DENSE) / max(1, config.num_hidden_layers - mixtures)
    of_block = (total(*{w.component for w in main}) - embedding - head - routed - total(SHARED, ROUTER, DENSE)) / (
        config.num_hidden_layers
    )
    module_experts = sum(w.total for w in modules if w.component == ROUTED)
    costs, last_cost = layer_costs(config)
    parameters = []
    for rank, (layers, is_first, is_last) in enumerate(_layers_of_ranks(config, sizes)):
        own_mixtures = sum(map(config.is_moe_layer, layers))
        has_embedding = is_first or (is_last and (number or config.tie_word_embeddings))
        ends = embedding if has_embedding else 0
        ends += head + sum(w.total for w in modules) - module_experts if is_last else 0
        work = sum(costs[layer] for layer in layers) + (last_cost if is_last else 0)
        parameters.append(
            StageParameters(
                rank=rank,
                blocks=len(layers) / config.num_hidden_layers,
                mixtures=own_mixtures + (number if is_last and config.n_routed_experts else 0),
                dense=len(layers) * of_block + own_mixtures * of_mixture + (len(layers) - own_mixtures) * of_dense,
                routed=own_mixtures * routed / max(1, mixtures) + (module_experts if is_last else 0),
                ends=ends,
                has_head=is_last,
                work=work / (sum(costs) + last_cost),
            )
        )
    return tuple(parameters)


def imbalance(config: ModelConfig, sizes: MeshSizes) -> float:
    """The work of the pipeline rank that has most, over the mean."""
    return max(rank.work for rank in rank_parameters(config, sizes)) * sizes.pipeline


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


@lru_cache(maxsize=256)
def _memory_of_one_device(settings: TrainSettings, precision: str, kind: str, length: int) -> MemoryEstimate:
    return plan_memory(settings, precision, kind, 1, length)


class DeviceLoad:
    """What the devices, of `kind` cpu or cuda, do and hold in a step of one stage of the run: 0 is pretraining."""

    def __init__(
        self, settings: TrainSettings, sizes: MeshSizes, precision: str, kind: str = "cuda", stage: int = 0
    ) -> None:
        self.settings, self.sizes, self.precision, self.kind = settings, sizes, precision, kind
        self.width = 4 if precision == "fp32" else 2
        self.ranks = rank_parameters(settings.model, sizes)
        self.length, batch = settings.stages[stage].sequence_length, settings.stages[stage].batch_sequences
        micro = settings.micro_sequences(self.length)
        self.passes = max(1, batch // sizes.ranks // micro)
        self.tokens = micro * self.length  # of a micro-batch
        self.batch_tokens = batch * self.length
        self.alone = _memory_of_one_device(settings, precision, kind, self.length)
        self.largest_block = self.tokens * largest_block(settings.model, precision, kind, self.length)

    @property
    def flops(self) -> int:
        """Of a step, on all devices."""
        return self.settings.flops(self.settings.total_tokens, self.batch_tokens, self.length)

    def computing(self, device: DeviceKind, repeated: float) -> float:
        """Seconds of a device's computation in a step, each kernel at its own rate; the mean of a pipeline's ranks."""
        saved = saved_per_token(self.settings.model, self.precision, self.kind, self.length)
        work = TokenWork.of(self.settings.model, self.length, saved)
        tokens = self.batch_tokens / (self.sizes.ranks * self.sizes.pipeline)
        return tokens * seconds_of_token(work, device, self.precision, repeated)

    def sending(self, device: DeviceKind, own: StageParameters | None = None) -> dict[str, float]:
        """Seconds in which a device (of the pipeline rank `own`, by default of the one that sends most) sends what it
        sends in a step, by kind. Ranks that differ in `expert` alone are neighbours, then those that differ in `data`,
        then the stages."""
        sizes, traffic = self.sizes, self.traffic(own)

        def rate(ranks: int) -> float:
            return device.neighbour_link if ranks <= MACHINE else device.link

        own_machine = min(sizes.expert, MACHINE) - 1
        others = max(1, sizes.expert - 1)
        to_expert = (own_machine / device.neighbour_link + (others - own_machine) / device.link) / others
        seconds = {
            DISPATCH: to_expert,
            "adding replicas": 1 / rate(sizes.ranks),
            "between stages": 1 / rate(sizes.ranks * sizes.pipeline),
        }
        return {name: size * seconds.get(name, 1 / rate(sizes.sharing)) for name, size in traffic.items()}

    def memory(self) -> dict[str, int]:
        """Bytes by part, of the rank that holds most."""
        return max(map(self._memory_of, self.ranks), key=lambda parts: sum(parts.values()))

    def _memory_of(self, own: StageParameters) -> dict[str, int]:
        settings, sizes, config = self.settings, self.sizes, self.settings.model
        states = MASTER * own.total / self.alone.gradients / sizes.sharing
        own_experts = own.routed / sizes.expert
        block = own.dense / (own.blocks * config.num_hidden_layers) + own_experts / max(1, own.mixtures)
        is_sharded = sizes.sharing > 1
        gathered = 3 * block  # this one, the next, this one's gradients
        if sizes.keep_gathered:
            gathered = 2 * (own.dense + own_experts)
        elif sizes.pipeline > 1:
            gathered = 2 * block + own.dense + own_experts  # gradients are added after the last micro-batch
        head = head_gradient_bytes(config)
        in_flight = micro_batches_in_flight(sizes.schedule, sizes.pipeline, self.passes, own.rank)
        recomputed = self.largest_block if settings.run.activation_checkpointing else 0.0
        parts = {
            "weights": self.alone.weights * states,
            "gradients": self.alone.gradients * states,
            "moments": self.alone.moments * states,
            "gathered blocks": MASTER * gathered if is_sharded else 0,
            "embedding and head": 2 * MASTER * own.ends if is_sharded else 0,  # and their gradients
            "compute copies": 0 if self.precision == "fp32" else self.width * block,
            "activations": (self.alone.activations - head) * own.blocks * in_flight + (head if own.has_head else 0),
            "dispatch": 4 * self.tokens * config.num_experts_per_tok * config.hidden_size * self.width
            if sizes.expert > 1
            else 0,
            "largest operation": self.alone.transient if own.has_head else recomputed,
        }
        return {name: round(size) for name, size in parts.items() if size}

    def traffic(self, own: StageParameters | None = None) -> dict[str, int]:
        """Bytes that a device sends in a step, all micro-batches together: of the rank `own`, by default of the one
        that sends most."""
        if own is None:
            return max(map(self.traffic, self.ranks), key=lambda kinds: sum(kinds.values()))
        sizes, config = self.sizes, self.settings.model
        dense = _ring(sizes.sharing) * MASTER * own.dense
        ends = _ring(sizes.sharing) * MASTER * own.ends
        experts = _ring(sizes.data) * MASTER * own.routed / sizes.expert
        shards = MASTER * own.total / sizes.sharing
        row = config.hidden_size * self.width
        exchanges = 6 if self.settings.run.activation_checkpointing else 4  # there and back, forward and backward
        rows = self.tokens * config.num_experts_per_tok * _ring(sizes.expert) * row * exchanges * own.mixtures
        messages = 2 * find_schedule(sizes.schedule).stages_per_rank  # a hidden state down, its gradient up
        times = 1 if sizes.keep_gathered else self.passes
        additions = 1 if sizes.pipeline > 1 else times
        kinds = {
            "gathering parameters": times * ((1 if sizes.keep_gathered else 2) * (dense + experts) + ends),
            "adding gradients": additions * (dense + experts + ends),
            "adding replicas": additions * 2 * _ring(sizes.replicate) * shards,
            DISPATCH: self.passes * rows if config.n_routed_experts else 0,
            "between stages": self.passes * messages * self.tokens * row if sizes.pipeline > 1 else 0,
        }
        return {name: round(size) for name, size in kinds.items() if size}


def _ring(ranks: int) -> float:
    """The share of the whole tensor that each of `ranks` sends in a ring all-gather or reduce-scatter."""
    return (ranks - 1) / ranks
