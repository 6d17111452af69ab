"""A recipe's training sections as frozen values, checked once, before anything is built.

Lengths of the run are counted in tokens, never in steps, so that a changed batch leaves the schedule where it was. An
unknown section or field, a wrong type and an impossible value are rejected by name. Nothing here imports torch.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from soli.analysis.parameters import training_flops
from soli.config import ModelConfig, replace, resolve
from soli.errors import SoliError
from soli.parallel.stages import ShareOfBatch, check_pipeline, find_schedule
from soli.sections import (
    BelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    convert,
    reject,
    suggest,
)
from soli.train.schedule import ExtensionSettings, ScheduleSettings, ramp_batches


@dataclass(frozen=True)
class OptimizerSettings(Section, section="optimizer"):
    """AdamW with the paper's constants (section 4.2), or Muon for matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip: PositiveFloat = 1.0
    momentum: BelowOne = 0.95  # Muon only
    moments: Literal["fp32", "bf16"] = "fp32"  # how moments are stored between steps
    router_rate: PositiveFloat = 1.0  # learning rate of the routers, as a share of the schedule's


@dataclass(frozen=True)
class BalanceSettings(Section, section="balance"):
    """Bias speed gamma and its end; alpha, the sequence-wise loss's weight (sections 2.1.2 and 4.2)."""

    gamma: NonNegativeFloat = 1e-3
    gamma_tokens: int | None = None  # after this many tokens the bias is constant; None: never
    alpha: NonNegativeFloat = 1e-4

    def gamma_at(self, tokens: int) -> float:
        """Bias speed of the step that starts after `tokens` tokens: 0 from `gamma_tokens` on."""
        return 0.0 if self.gamma_tokens is not None and tokens >= self.gamma_tokens else self.gamma


@dataclass(frozen=True)
class LossSettings(Section, section="losses"):
    """Lambda, the weight of multi-token prediction, and its switch (section 4.2: 0.3, then 0.1).

    # differs: before `mtp_from_tokens` the MTP modules are neither computed nor trained. The paper trains them from the
    first step, but there a module is one layer beside 61; in a small model it is a third of a step's FLOPs.
    """

    mtp_weight: NonNegativeFloat = 0.3
    mtp_weight_late: NonNegativeFloat = 0.1
    mtp_late_after_tokens: int | None = None  # None: no switch
    mtp_from_tokens: NonNegativeInt = 0
    mtp_alone: bool = False  # train the MTP modules alone, on what the model predicts itself (soli/train/mtp_alone.py)

    def mtp_weight_at(self, tokens: int) -> float:
        """Lambda of the step that starts after `tokens` tokens."""
        is_late = self.mtp_late_after_tokens is not None and tokens >= self.mtp_late_after_tokens
        return self.mtp_weight_late if is_late else self.mtp_weight

    def trains_mtp(self, tokens: int) -> bool:
        """Whether the step that starts after `tokens` tokens computes and trains the MTP modules."""
        return tokens >= self.mtp_from_tokens


@dataclass(frozen=True)
class RunSettings(Section, section="run"):
    """What does not change the recipe's mathematics: device, precision, how often to report and save, what to do when
    a step goes wrong (soli/train/anomalies.py)."""

    seed: int = 0
    initial_weights: str | None = None  # a model folder or name whose weights a new run starts from; None: random ones
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"  # of activations; fp8: bf16 and products in E4M3
    micro_sequences: PositiveInt = 16  # sequences in one forward pass; a step adds up the gradients of several
    activation_checkpointing: bool = False  # save only the blocks' inputs, and recompute each forward for its backward
    compile: bool = False  # torch.compile for the blocks' forward and backward, all but the routed experts
    cuda_graph: bool = False  # on a GPU: launch a step's forward and backward as one, where it is one micro-batch
    log_every: PositiveInt = 10  # steps
    save_every: NonNegativeInt = 200  # steps; 0 saves at the end alone
    keep: PositiveInt = 2  # latest checkpoints that are kept, besides the best
    max_minutes: float | None = None  # stop then, with the state saved; a later run resumes
    tensorboard: bool = False  # write event files beside metrics.jsonl, for the package tensorboard
    on_nan: Literal["stop", "skip"] = "stop"  # a step whose loss or gradient is not finite
    spike: Literal["report", "skip", "stop"] = "report"  # a step whose loss or gradient norm jumps
    spike_factor: NonNegativeFloat = 10.0  # how many median deviations above the median are a jump; 0: none is

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and self.precision == "fp8":
            raise SoliError("run.compile is true, but FP8 products are not compiled; set run.compile = false")


@dataclass(frozen=True)
class EvalSettings(Section, section="eval"):
    """Held-out text: how often, how much, how many sample translations."""

    every: NonNegativeInt = 200  # steps; 0 evaluates at the end alone
    tokens: PositiveInt = 65536
    samples: NonNegativeInt = 4
    sample_tokens: NonNegativeInt = 64


@dataclass(frozen=True)
class ParallelSettings(Section, section="parallel"):
    """How many processes share the run, and how (docs/distributed.md). The product of the sizes is their number."""

    data: PositiveInt = 1  # ranks with the same experts: parameters, gradients and moments are sharded over them
    expert: PositiveInt = 1  # ranks that each have a part of every layer's experts
    pipeline: PositiveInt = 1  # ranks that each have some of the layers; micro-batches pass from one to the next
    schedule: str = "1F1B"  # of the pipeline, as torch calls it: 1F1B, Interleaved1F1B, ZBVZeroBubble, DualPipeV
    context: PositiveInt = 1  # ranks that share a sequence; only 1
    replicate: PositiveInt = 1  # copies of all of this, whose gradients are added (HSDP)
    keep_gathered: bool = False  # gather parameters and add gradients once a step, not once a micro-batch: more memory

    def __post_init__(self) -> None:
        super().__post_init__()
        find_schedule(self.schedule)
        if self.context > 1:
            reject("parallel.context", self.context, "context parallelism is not built; set it to 1")

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.shares * self.pipeline

    @property
    def shares(self) -> int:
        """Shares of a batch; the ranks of a pipeline have the same one."""
        return self.data * self.expert * self.replicate

    def require_world(self, processes: int) -> None:
        """SoliError unless the run has so many processes."""
        if self.world == processes:
            return
        sizes = f"data {self.data} x expert {self.expert} x replicate {self.replicate}"
        sizes += f" x pipeline {self.pipeline}" if self.pipeline > 1 else ""
        start = f"start it with soli train --processes {self.world}, or torchrun, or " if self.world > 1 else ""
        raise SoliError(
            f"[parallel] is for {self.world} processes ({sizes}), but there are {processes}; {start}use "
            f"--set parallel.data={processes} with the other sizes 1"
        )


@dataclass(frozen=True)
class TrainSettings:
    """Everything `soli train` reads, except the `data` section, which belongs to the corpus step."""

    model: ModelConfig
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    balance: BalanceSettings
    losses: LossSettings
    run: RunSettings
    eval: EvalSettings
    extension: tuple[ExtensionSettings, ...] = ()
    parallel: ParallelSettings = ParallelSettings()

    def __post_init__(self) -> None:
        _check_parallel(self)
        if self.losses.mtp_alone:
            _check_mtp_alone(self)
        config = self.model
        if config.index_topk is not None:
            raise SoliError(
                f"model.model_type is {config.model_type!r}, whose sparse attention cannot be trained: the selection "
                "gives the indexer no gradient; choose deepseek_v3"
            )
        _require_positions("schedule", self.schedule.sequence_length, config)
        for phase in self.extension:
            config = phase.extend_context(config)
            _require_positions("extension", phase.sequence_length, config)

    @property
    def stages(self) -> tuple[ScheduleSettings | ExtensionSettings, ...]:
        """What each stage of the run reads and for how long: pretraining, number 0, then the extension phases."""
        return (self.schedule, *self.extension)

    def micro_sequences(self, length: int) -> int:
        """Sequences of a micro-batch where they have `length` tokens: as many tokens as in pretraining."""
        return max(1, self.run.micro_sequences * self.schedule.sequence_length // length)

    @property
    def total_tokens(self) -> int:
        """Length of the run in all its stages."""
        return sum(stage.total_tokens for stage in self.stages)

    def flops(self, start: int, tokens: int, length: int) -> int:
        """FLOPs of the `tokens` tokens, in sequences of `length`, that follow the first `start`: forward and backward,
        without the MTP modules before they are trained; where they alone are, the model is computed once, forward."""
        if self.losses.mtp_alone:
            alone = training_flops(self.model, length, mtp=False)
            return tokens * (training_flops(self.model, length) - alone + alone // 3)
        before_mtp = min(tokens, max(0, self.losses.mtp_from_tokens - start))
        per_token = training_flops(self.model, length)
        return tokens * per_token - before_mtp * (per_token - training_flops(self.model, length, mtp=False))


SECTIONS: dict[str, type[Section]] = {
    cls.section: cls
    for cls in (
        OptimizerSettings,
        ScheduleSettings,
        BalanceSettings,
        LossSettings,
        RunSettings,
        EvalSettings,
        ParallelSettings,
    )
}


def read_settings(recipe: dict[str, Any]) -> TrainSettings:
    """The training sections of a recipe, defaults filled in. SoliError names the section and field that it rejects."""
    known = (*SECTIONS, "data", "model", "extension")
    for section in recipe:
        if section not in known:
            raise SoliError(f"the recipe has a section [{section}]; {suggest(section, known)}")
    sections: dict[str, Any] = {name: cls.from_dict(recipe.get(name, {})) for name, cls in SECTIONS.items()}
    extension = _read_extension(recipe.get("extension", ()))
    return TrainSettings(model=_read_model(recipe.get("model", {})), extension=extension, **sections)


def as_recipe(settings: TrainSettings, data: dict[str, Any]) -> dict[str, Any]:
    """The recipe with every default resolved, as `read_settings` reads it back."""
    sections = {name: dataclasses.asdict(getattr(settings, name)) for name in SECTIONS}
    extension = [
        {**dataclasses.asdict(phase), "rope_scaling": phase.rope_scaling and phase.rope_scaling.to_dict()}
        for phase in settings.extension
    ]
    return {"data": data, "model": settings.model.to_dict(), **sections, "extension": extension}


def _check_mtp_alone(settings: TrainSettings) -> None:
    """SoliError where `losses.mtp_alone` would train nothing, or is asked together with what it does not go with."""
    losses, alone = settings.losses, "losses.mtp_alone is true, but "
    if not settings.model.num_nextn_predict_layers:
        raise SoliError(f"{alone}the model has no MTP module: set model.num_nextn_predict_layers to 1")
    if losses.mtp_from_tokens:
        raise SoliError(f"{alone}losses.mtp_from_tokens is {losses.mtp_from_tokens:,}: set it to 0")
    if not losses.mtp_weight or not losses.mtp_weight_late:
        raise SoliError(f"{alone}a weight of the MTP loss is 0, so nothing would be trained: set it above 0")
    if settings.run.initial_weights is None:
        raise SoliError(f"{alone}the model would be a random one: give it with run.initial_weights")
    if settings.run.cuda_graph or settings.parallel.pipeline > 1:
        option = "run.cuda_graph = false" if settings.run.cuda_graph else "parallel.pipeline = 1"
        raise SoliError(f"{alone}that is built without it: set {option}")


def _check_parallel(settings: TrainSettings) -> None:
    """SoliError where ranks cannot share the experts or a step's sequences evenly, or an option needs one process."""
    parallel, world, shares = settings.parallel, settings.parallel.world, settings.parallel.shares
    experts = settings.model.n_routed_experts or 0
    if parallel.expert > 1 and (not experts or experts % parallel.expert):
        reject("parallel.expert", parallel.expert, f"it must divide the model's {experts} routed experts")
    schedule = settings.schedule
    batches = {
        "schedule.batch_sequences_start": schedule.batch_sequences_start,
        "schedule.batch_sequences": schedule.batch_sequences,
        **{f"extension[{n}].batch_sequences": phase.batch_sequences for n, phase in enumerate(settings.extension)},
    }
    for name, sequences in batches.items():
        if sequences is not None and sequences % shares:
            sizes = "parallel.data x parallel.expert x parallel.replicate"
            reject(name, sequences, f"the {shares} processes of {sizes} must divide it")
    if parallel.pipeline > 1:
        if shares > 1 and find_schedule(parallel.schedule).splits_backward:
            _check_split_backward(settings)
        check_pipeline(settings.model, parallel.pipeline, parallel.schedule, _pipeline_batches(settings))
    for option, reason in (("cuda_graph", "a graph holds one process's step"), ("compile", "shards are not compiled")):
        if world > 1 and getattr(settings.run, option):
            raise SoliError(f"run.{option} is true, but {reason}; set run.{option} = false for {world} processes")


def _check_split_backward(settings: TrainSettings) -> None:
    """SoliError where a schedule that computes gradients of weights after those of inputs cannot have stages of several
    ranks."""
    parallel = settings.parallel
    other = "choose 1F1B or Interleaved1F1B, or set data, expert and replicate to 1"
    if settings.model.tie_word_embeddings:
        reason = "its first and last stage are on one rank, and FSDP2 shards no tied embedding and head of two; "
        reason += other
        reject("parallel.schedule", parallel.schedule, reason)
    if parallel.expert > 1 and settings.run.activation_checkpointing:
        reason = "with run.activation_checkpointing each rank recomputes a block as often as it has groups of weights, "
        reason += f"and would send tokens to experts at other times than the others; {other}"
        reject("parallel.schedule", parallel.schedule, reason)
    if not parallel.keep_gathered:
        reason = f"schedule {parallel.schedule} computes gradients of weights after those of inputs, and torch finds "
        reason += "the weights only where they stayed gathered; set it to true"
        reject("parallel.keep_gathered", False, reason)


def _pipeline_batches(settings: TrainSettings) -> Iterator[ShareOfBatch]:
    """What the ranks of a pipeline compute together in the steps of the run, by the field that says so."""
    schedule, shares = settings.schedule, settings.parallel.shares
    micro = settings.run.micro_sequences
    start, full = schedule.batch_sequences_start, schedule.batch_sequences
    yield ShareOfBatch("schedule.batch_sequences", full // shares, micro)
    if start is not None:
        yield ShareOfBatch("schedule.batch_sequences_start", start // shares, micro)
        for sequences in ramp_batches(schedule):
            if sequences % shares:
                reject(
                    "schedule.batch_ramp_tokens",
                    schedule.batch_ramp_tokens,
                    f"the ramp has batches of {sequences} sequences, which {shares} pipelines cannot share evenly; use "
                    f"--set schedule.batch_ramp_multiple={shares}",
                )
            yield ShareOfBatch("schedule.batch_ramp_tokens", sequences // shares, micro, is_within_ramp=True)
    for number, phase in enumerate(settings.extension):
        micro = settings.micro_sequences(phase.sequence_length)
        yield ShareOfBatch(f"extension[{number}].batch_sequences", phase.batch_sequences // shares, micro)


def _require_positions(section: str, length: int, config: ModelConfig) -> None:
    if length > config.max_position_embeddings:
        raise SoliError(
            f"{section}.sequence_length is {length}, but model.max_position_embeddings is "
            f"{config.max_position_embeddings}; shorten the one or raise the other"
        )


def _read_model(table: Any) -> ModelConfig:
    if not isinstance(table, dict):
        raise SoliError(f"the section model is {table!r}; write a table, [model]")
    if "preset" not in table:
        return ModelConfig.from_dict(table)
    changes = {name: value for name, value in table.items() if name != "preset"}
    return replace(resolve(convert("model.preset", table["preset"], str)), changes)


def _read_extension(tables: Any) -> tuple[ExtensionSettings, ...]:
    if not isinstance(tables, list | tuple):
        raise SoliError(f"the recipe's extension is {tables!r}; write each phase under [[extension]]")
    return tuple(ExtensionSettings.from_dict(table) for table in tables)
