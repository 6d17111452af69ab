"""What changes during a run, in tokens: the schedule's settings, and pure functions of the tokens seen so far.

Learning rate (warm-up, constant, cosine, tails), batch ramp, gamma and lambda (section 4.2); then extension phases,
each with a length, batch, rate and YaRN of its own (section 4.3). Counting tokens, not steps, keeps the curves where
they are when the batch changes. The value at `tokens` holds for the whole step that starts there. No torch.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

from soli.config import ModelConfig, RopeScaling, replace
from soli.errors import SoliError
from soli.sections import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, reject

MAX_RAMP_STEPS = 1_000_000  # each is listed


@dataclass(frozen=True)
class ScheduleSettings(Section, section="schedule"):
    """Batch shape, and the learning rate's phases in the paper's order: warm-up, constant, cosine, tails.

    Warm-up is given in tokens or in steps, the constant phase by its length or by the token at which it ends.
    """

    sequence_length: PositiveInt = 256
    batch_sequences: PositiveInt = 64  # sequences in one optimizer step
    batch_sequences_start: PositiveInt | None = None  # the ramp's first batch; None: no ramp
    batch_ramp_tokens: NonNegativeInt = 0  # from here on the batch is `batch_sequences`
    batch_ramp_multiple: PositiveInt = 1  # the ramp rises by multiples of so many sequences: for pipelines
    learning_rate: PositiveFloat = 1e-3
    final_learning_rate: NonNegativeFloat = 1e-4  # where the cosine ends
    warmup_tokens: NonNegativeInt = 0
    warmup_steps: NonNegativeInt | None = None  # instead of warmup_tokens
    constant_tokens: NonNegativeInt = 0
    constant_until_tokens: NonNegativeInt | None = (
        None  # instead of constant_tokens: warm-up and constant phase together
    )
    cosine_tokens: NonNegativeInt = 0
    tails: tuple[tuple[PositiveFloat, NonNegativeFloat], ...] = ()  # (tokens, learning rate), one after the other

    def __post_init__(self) -> None:
        super().__post_init__()
        start = self.batch_sequences_start
        if (start is None) != (self.batch_ramp_tokens == 0):
            missing = "batch_sequences_start" if start is None else "batch_ramp_tokens"
            raise SoliError(f"the batch ramp lacks schedule.{missing}; it needs that and its other half, or neither")
        if start is not None and self.batch_ramp_tokens > MAX_RAMP_STEPS * self.sequence_length * start:
            reject(
                "schedule.batch_ramp_tokens",
                self.batch_ramp_tokens,
                f"in batches of {start} sequences that is more than {MAX_RAMP_STEPS:,} steps",
            )
        if start is not None and start > self.batch_sequences:
            reject(
                "schedule.batch_sequences_start", start, f"it must be at most batch_sequences, {self.batch_sequences}"
            )
        for name, other in (("warmup_steps", "warmup_tokens"), ("constant_until_tokens", "constant_tokens")):
            if getattr(self, name) is not None and getattr(self, other):
                raise SoliError(f"schedule has both {name} and {other}; keep one of them")
        until = self.constant_until_tokens
        if until is not None and until < warmup_end(self):
            raise SoliError(
                f"schedule.constant_until_tokens is {until:,}, but the warm-up takes {warmup_end(self):,} tokens; "
                "shorten the warm-up"
            )
        if self.total_tokens <= 0:
            raise SoliError(
                "schedule has no tokens to train on; give schedule.constant_tokens or schedule.cosine_tokens"
            )

    @property
    def constant_end(self) -> int:
        """Tokens of warm-up and constant phase together."""
        if self.constant_until_tokens is not None:
            return self.constant_until_tokens
        return warmup_end(self) + self.constant_tokens

    @property
    def total_tokens(self) -> int:
        """Length of pretraining: the sum of its phases."""
        return self.constant_end + self.cosine_tokens + int(sum(tokens for tokens, _ in self.tails))


@dataclass(frozen=True)
class ExtensionSettings(Section, section="extension"):
    """A phase after pretraining that lengthens the context (section 4.3): constant rate and batch, its own YaRN.

    `rope_scaling` None leaves the model's positions as they are. Its length is given in steps or in tokens.
    """

    sequence_length: PositiveInt
    batch_sequences: PositiveInt
    learning_rate: PositiveFloat
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.steps is None) == (self.tokens is None):
            raise SoliError("an [[extension]] gives its length once: set either steps or tokens")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the phase; the last one is never partial."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.tokens or 0) / (self.sequence_length * self.batch_sequences))

    @property
    def total_tokens(self) -> int:
        """Tokens of the phase in whole steps."""
        return self.total_steps * self.sequence_length * self.batch_sequences

    def extend_context(self, config: ModelConfig) -> ModelConfig:
        """The configuration that this phase trains: YaRN set, and positions for `factor` times the original context."""
        return config if self.rope_scaling is None else _extend_context(config, self.rope_scaling)


@lru_cache(maxsize=64)  # the search for a mesh makes a recipe's phases a thousand times
def _extend_context(config: ModelConfig, yarn: RopeScaling) -> ModelConfig:
    positions = max(config.max_position_embeddings, int(yarn.factor * yarn.original_max_position_embeddings))
    return replace(config, {"rope_scaling": yarn.to_dict(), "max_position_embeddings": positions})


def stage_name(number: int) -> str:
    """Of a run's stages: 0 is pretraining, the others are extension phases."""
    return f"extension {number}" if number else "pretraining"


def batch_sequences(schedule: ScheduleSettings, tokens: int) -> int:
    """Sequences in the step that starts after `tokens` tokens: a straight line from the ramp's start to the full batch.

    # differs: the paper says "gradually increased" and not how; here linearly in tokens, rounded down to a sequence.
    """
    start, full, ramp = schedule.batch_sequences_start, schedule.batch_sequences, schedule.batch_ramp_tokens
    if start is None or tokens >= ramp:
        return full
    rise = (full - start) * tokens // ramp
    return start + rise - rise % schedule.batch_ramp_multiple


def batch_tokens(schedule: ScheduleSettings, tokens: int) -> int:
    """Tokens that the step which starts after `tokens` tokens learns to predict."""
    return schedule.sequence_length * batch_sequences(schedule, tokens)


@lru_cache(maxsize=8)
def _ramp_starts(schedule: ScheduleSettings) -> tuple[int, ...]:
    """Tokens seen when each step of the ramp starts; the last entry is the first step with the full batch."""
    starts = [0]
    while batch_sequences(schedule, starts[-1]) < schedule.batch_sequences:
        starts.append(starts[-1] + batch_tokens(schedule, starts[-1]))
    return tuple(starts)


@lru_cache(maxsize=64)
def _ramp_batches(schedule: ScheduleSettings) -> tuple[int, ...]:
    return tuple(sorted({batch_sequences(schedule, tokens) for tokens in _ramp_starts(schedule)}))


def ramp_batches(schedule: ScheduleSettings) -> list[int]:
    """The different batches of the steps of pretraining, in sequences, the smallest first."""
    return list(_ramp_batches(schedule))


def tokens_after(schedule: ScheduleSettings, steps: int) -> int:
    """Tokens seen after so many whole steps of pretraining."""
    starts = _ramp_starts(schedule)
    if steps < len(starts):
        return starts[steps]
    return starts[-1] + (steps - len(starts) + 1) * schedule.sequence_length * schedule.batch_sequences


def steps_before(schedule: ScheduleSettings, tokens: int) -> int:
    """Steps of pretraining that start before `tokens` tokens; the inverse of `tokens_after` at whole steps."""
    starts = _ramp_starts(schedule)
    if tokens <= starts[-1]:
        return bisect_left(starts, tokens)
    return len(starts) - 1 - (starts[-1] - tokens) // (schedule.sequence_length * schedule.batch_sequences)


def warmup_end(schedule: ScheduleSettings) -> int:
    """Tokens of the warm-up; one given in steps is as long as those steps, the ramp's batches included."""
    return schedule.warmup_tokens if schedule.warmup_steps is None else tokens_after(schedule, schedule.warmup_steps)


def learning_rate(schedule: ScheduleSettings, tokens: int) -> float:
    """Rate of the step that starts after `tokens` tokens: linear warm-up, constant, cosine to the final rate, tails.

    Warm-up counts the step's own tokens, so the first step has a rate above 0. Past the end the last phase holds.
    """
    peak, final = schedule.learning_rate, schedule.final_learning_rate
    if tokens < warmup_end(schedule):
        if schedule.warmup_steps is not None:
            return peak * min(1.0, (steps_before(schedule, tokens) + 1) / schedule.warmup_steps)
        return peak * min(1.0, (tokens + batch_tokens(schedule, tokens)) / schedule.warmup_tokens)
    tokens -= schedule.constant_end
    if tokens < 0:
        return peak
    if tokens < schedule.cosine_tokens:
        return final + (peak - final) * (1 + math.cos(math.pi * tokens / schedule.cosine_tokens)) / 2
    tokens -= schedule.cosine_tokens
    rate = final if schedule.cosine_tokens else peak
    for length, tail_rate in schedule.tails:
        rate = tail_rate
        if tokens < length:
            break
        tokens -= int(length)
    return rate
