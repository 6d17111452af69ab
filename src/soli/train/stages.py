"""The stages of a run: pretraining, number 0, then each [[extension]] phase that lengthens the context (section 4.3).

A stage reads windows of its own length in an order of its own, and trains a configuration with its own YaRN; an
extension phase has a constant batch and learning rate. Tokens are counted over the whole run, so that gamma and lambda
are functions of one number. Every stage is built before the first step: data too short for it are rejected then.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from torch import Tensor

from soli.config import ModelConfig
from soli.errors import SoliError
from soli.train.batches import Batches, PackedTokens, heldout_windows
from soli.train.run_folder import RunProgress
from soli.train.schedule import batch_sequences, learning_rate, stage_name
from soli.train.settings import TrainSettings


@dataclass(frozen=True)
class Stage:
    """What the steps of one stage read, and the configuration they train."""

    config: ModelConfig
    length: int  # tokens of a sequence
    batches: Batches
    heldout_BW: Tensor
    micro_sequences: int  # in one forward pass


def build_stages(settings: TrainSettings, train: PackedTokens, valid: PackedTokens) -> tuple[Stage, ...]:
    """Every stage of the run, in order. SoliError when the data are too short for one of them."""
    extra = 1 + settings.model.num_nextn_predict_layers
    stages: list[Stage] = []
    for number, stage_settings in enumerate(settings.stages):
        length = stage_settings.sequence_length
        stage = Stage(
            config=settings.extension[number - 1].extend_context(stages[-1].config) if number else settings.model,
            length=length,
            batches=Batches(train, length, extra, _seed(settings.run.seed, number)),
            heldout_BW=heldout_windows(valid, length, extra, settings.eval.tokens),
            micro_sequences=settings.micro_sequences(length),
        )
        stages.append(stage)
    return tuple(stages)


def next_step(settings: TrainSettings, progress: RunProgress) -> tuple[int, float]:
    """Sequences and learning rate of the step that starts at `progress`."""
    if progress.stage == 0:
        return batch_sequences(settings.schedule, progress.tokens), learning_rate(settings.schedule, progress.tokens)
    phase = settings.extension[progress.stage - 1]
    return phase.batch_sequences, phase.learning_rate


def stage_tokens_left(settings: TrainSettings, progress: RunProgress) -> int:
    """Tokens until the current stage ends; 0 or less when it has."""
    return progress.stage_start + settings.stages[progress.stage].total_tokens - progress.tokens


def is_finished(settings: TrainSettings, progress: RunProgress) -> bool:
    """Whether the last stage has ended."""
    return progress.stage == len(settings.extension) and stage_tokens_left(settings, progress) <= 0


def flops_left(settings: TrainSettings, progress: RunProgress) -> int:
    """FLOPs from here to the end of the run: a token of a longer sequence costs more."""
    later = [stage.total_tokens for stage in settings.stages[progress.stage + 1 :]]
    tokens_left = [max(0, stage_tokens_left(settings, progress)), *later]
    lengths = [stage.sequence_length for stage in settings.stages[progress.stage :]]
    starts = accumulate(tokens_left, initial=progress.tokens)
    return sum(map(settings.flops, starts, tokens_left, lengths))


def check_stage(
    settings: TrainSettings, stages: tuple[Stage, ...], progress: RunProgress, trained: ModelConfig
) -> None:
    """SoliError unless a checkpoint at `progress`, whose model was `trained`, is at a stage of these settings."""
    number = progress.stage
    if number >= len(stages):
        raise SoliError(
            f"the run is in extension phase {number}, but the recipe has {len(settings.extension)}; keep the "
            "[[extension]] phases that it has started"
        )
    stage = stages[number]
    is_same = (trained.rope_scaling, trained.max_position_embeddings) == (
        stage.config.rope_scaling,
        stage.config.max_position_embeddings,
    )
    if not is_same or progress.position * stage.length != progress.tokens - progress.stage_start:
        raise SoliError(
            f"{stage_name(number)} was started with another length or rope_scaling than the recipe's; keep those of "
            "the stage that the run is in, or choose another --out to start a new run"
        )


def _seed(seed: int, number: int) -> int:
    """Pretraining orders its data by the run's seed, each phase by one of its own."""
    return int(np.random.default_rng([seed, number]).integers(1 << 62)) if number else seed
