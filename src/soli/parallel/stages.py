"""What a pipeline is made of: torch's schedules by name, and the layers of each stage. No torch.

A schedule has one or two stages on each rank. Two are in a loop (rank r has stages r and r + P of P ranks), or in a V
(r and 2 P - 1 - r): the first rank then has the first and the last stage.

Layers are divided so that the most expensive stage is as cheap as possible. The cost of a block is its activated
parameters; the last stage also has the head, once for each prediction, and the MTP modules. An embedding costs nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from soli.analysis.parameters import DENSE, EMBEDDING, HEAD, ROUTED, ROUTER, SHARED, mtp_weights, weights
from soli.config import ModelConfig
from soli.errors import SoliError
from soli.sections import reject, suggest


@dataclass(frozen=True)
class PipelineSchedule:
    """One of torch.distributed.pipelining's schedules, under torch's name."""

    name: str
    stages_per_rank: int = 1
    is_v_shaped: bool = False
    takes_whole_rounds: bool = False  # micro-batches are processed in rounds of equal size, of at least one per rank
    splits_backward: bool = False  # gradients of inputs first, those of weights when a rank would wait

    def stages(self, ranks: int) -> int:
        """Stages of a pipeline of so many ranks."""
        return ranks * self.stages_per_rank

    def stages_of(self, rank: int, ranks: int) -> list[int]:
        """Numbers of the stages of one rank, ascending."""
        return [stage for stage in range(self.stages(ranks)) if self.rank_of(stage, ranks) == rank]

    def rank_of(self, stage: int, ranks: int) -> int:
        """The rank that has a stage."""
        half, rank = divmod(stage, ranks)
        return ranks - 1 - rank if self.is_v_shaped and half else rank

    def reason_against(self, micro_batches: int, ranks: int) -> str:
        """Why a step cannot have so many micro-batches; "" where it can."""
        least = self.stages(ranks) if self.name == "DualPipeV" else ranks
        if micro_batches < least:
            return f"schedule {self.name} on {ranks} ranks needs at least {least} micro-batches"
        rounds = micro_batches // ranks
        if self.takes_whole_rounds and micro_batches % rounds:
            return f"schedule {self.name} takes them in {rounds} rounds of equal size"
        return ""


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        PipelineSchedule("1F1B"),
        PipelineSchedule("Interleaved1F1B", stages_per_rank=2, takes_whole_rounds=True),
        PipelineSchedule("ZBVZeroBubble", stages_per_rank=2, is_v_shaped=True, splits_backward=True),
        PipelineSchedule("DualPipeV", stages_per_rank=2, is_v_shaped=True, splits_backward=True),
    )
}


def find_schedule(name: str) -> PipelineSchedule:
    """A schedule by torch's name, in any case; SoliError for an unknown one."""
    for schedule in SCHEDULES.values():
        if schedule.name.lower() == name.lower():
            return schedule
    raise SoliError(f"parallel.schedule is {name!r}; {suggest(name, SCHEDULES)}")


def micro_batch_size(schedule: PipelineSchedule, ranks: int, sequences: int, most: int) -> int | None:
    """Sequences of a micro-batch, at most `most`, so that all micro-batches of a share of the batch are of equal size
    and of a number that the schedule takes; None where there is no such size."""
    sizes = (size for size in range(min(most, sequences), 0, -1) if sequences % size == 0)
    return next((size for size in sizes if not schedule.reason_against(sequences // size, ranks)), None)


@dataclass(frozen=True)
class ShareOfBatch:
    """What the ranks of a pipeline compute together in a step: `sequences`, of a batch that the recipe calls `name`, in
    micro-batches of `micro_sequences`. Between the ends of a batch ramp micro-batches may be smaller."""

    name: str
    sequences: int
    micro_sequences: int
    is_within_ramp: bool = False


def check_pipeline(config: ModelConfig, ranks: int, name: str, shares: Iterable[ShareOfBatch]) -> None:
    """SoliError where so many ranks cannot be a pipeline of this model, or cannot share one of the batches."""
    schedule = find_schedule(name)
    stages, layers = schedule.stages(ranks), config.num_hidden_layers
    if stages > layers:
        each = "" if schedule.stages_per_rank == 1 else f", {schedule.stages_per_rank} for each rank"
        reason = f"schedule {schedule.name} has {stages} stages{each}, but the model {layers} layers"
        reject("parallel.pipeline", ranks, reason)
    uses = config.num_nextn_predict_layers + config.tie_word_embeddings
    if schedule.splits_backward and uses > 1:
        head = " and the tied head" if config.tie_word_embeddings else ""
        reason = f"the last stage uses the embedding in {config.num_nextn_predict_layers} MTP modules{head}, whose "
        reason += "gradient of weights torch cannot compute apart from that of inputs; choose 1F1B or Interleaved1F1B"
        reject("parallel.schedule", name, reason)
    for share in shares:
        size = micro_batch_size(schedule, ranks, share.sequences, share.micro_sequences)
        if size == share.micro_sequences or (share.is_within_ramp and size is not None):
            continue
        whole, rest = divmod(share.sequences, share.micro_sequences)
        micro_batches = f"{whole} micro-batch{'' if whole == 1 else 'es'} of {share.micro_sequences}"
        micro_batches += f" and one of {rest}" if rest else ""
        reason = "all must be of equal size" if rest else schedule.reason_against(whole, ranks)
        raise SoliError(
            f"{share.name} gives each pipeline {share.sequences} sequences, {micro_batches}, but {reason}; change "
            "run.micro_sequences, or parallel.pipeline"
        )


@cache
def divide_layers(config: ModelConfig, stages: int) -> tuple[range, ...]:
    """The layers of each stage, consecutive, at least one, as even in cost as they can be.

    SoliError where there are more stages than layers.
    """
    if stages > config.num_hidden_layers:
        raise SoliError(f"{stages} pipeline stages cannot share {config.num_hidden_layers} layers, one at least each")
    costs, last = layer_costs(config)
    sums = [0, *accumulate(costs)]
    ends = [len(costs)]
    for stage in reversed(range(1, stages)):
        # The last stages first: each takes as many layers as the best division of all of them allows.
        ends.insert(0, _best_start(sums, last, stages, stage, ends))
    return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))


def _best_start(sums: Sequence[int], last: int, stages: int, stage: int, ends: Sequence[int]) -> int:
    """Where `stage` starts, given where the stages after it end: its first layer in a division whose most expensive
    stage is the cheapest; of several, the one in which `stage` has the fewest layers."""
    end = ends[0]
    extra = last if stage == stages - 1 else 0
    starts = range(end - 1, stage - 1, -1)
    return min(starts, key=lambda start: max(sums[end] - sums[start] + extra, _cheapest(tuple(sums), start, stage)))


@cache
def _cheapest(sums: tuple[int, ...], layers: int, stages: int) -> int:
    """The cost of the most expensive of `stages` stages that share the first `layers` layers, at best."""
    if stages == 1:
        return sums[layers]
    starts = range(stages - 1, layers)
    return min(max(sums[layers] - sums[start], _cheapest(sums, start, stages - 1)) for start in starts)


def layer_costs(config: ModelConfig) -> tuple[list[int], int]:
    """Activated parameters of each block, and of what the last stage has besides blocks."""
    main = weights(config)
    mixture, dense = (ROUTED, SHARED, ROUTER), (DENSE,)
    of_blocks = {
        components: sum(w.activated for w in main if w.component in components) for components in (mixture, dense)
    }
    shared = sum(w.activated for w in main if w.component not in (*mixture, *dense, EMBEDDING, HEAD))
    mixtures = config.num_moe_layers
    per_mixture = of_blocks[mixture] // max(1, mixtures)
    per_dense = of_blocks[dense] // max(1, config.num_hidden_layers - mixtures)
    per_block = shared // config.num_hidden_layers
    costs = [
        per_block + (per_mixture if config.is_moe_layer(layer) else per_dense)
        for layer in range(config.num_hidden_layers)
    ]
    predictions = 1 + config.num_nextn_predict_layers
    head = predictions * config.vocab_size * config.hidden_size
    return costs, head + sum(w.activated for w in mtp_weights(config))
