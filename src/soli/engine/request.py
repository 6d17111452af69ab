"""What goes into the engine and what comes out: requests, events, limits, figures. Values only; nothing here computes.

A request is one answer to one prompt; n answers are n requests whose seeds `SamplingParams.numbered` derives.
"""

from dataclasses import dataclass
from typing import Literal

from soli.engine.constraint import ConstraintSpec
from soli.engine.logprobs import TokenLogprob
from soli.engine.sampler import GREEDY, SamplingParams
from soli.errors import SoliError
from soli.model.router import Routing

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """What one caller wants.

    `stop`: strings, found across token borders, that end the text and are no part of it. `logprobs`: None for none, k
    for the drawn token's and the k likeliest. `trace`: the routing of every token that is read, the prompt's included.
    `masked_experts`: (layer, expert) pairs that must not be selected; layers are numbered as in the files.
    `constraint`: what the whole text must be; it ends where nothing else can follow.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    trace: bool = False
    masked_experts: frozenset[tuple[int, int]] = frozenset()
    constraint: ConstraintSpec | None = None


@dataclass(frozen=True)
class Usage:
    """What a request took, in tokens. `cached`: of the prompt, found in the cache and not read again."""

    prompt: int
    completion: int
    cached: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Event:
    """What one step brought to one request.

    `token` None: only held-back text, routing of a part of the prompt, or the end. `text`: whole characters that no
    stop string can take back; often "". `routing`: of the tokens read in this step, one Routing per MoE layer of the
    main model. The last event has `finish_reason` and `usage`; with "error" also `error`, one sentence.
    """

    request: int
    token: int | None = None
    text: str = ""
    logprob: TokenLogprob | None = None
    routing: tuple[Routing, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None


@dataclass(frozen=True)
class EngineLimits:
    """What the engine may take. `cache_bytes` is never passed; `tokens_per_step` bounds what one step reads, so that a
    long prompt delays the next token of the others by no more than that. `prefix_sharing`: keep the pages of
    prompts for later ones that begin alike. `speculate`: draft with the model's MTP module; measured to be slower on
    CPUs (benchmarks/speculation.py)."""

    cache_bytes: int = 2**30
    max_running: int = 16
    max_waiting: int = 256
    tokens_per_step: int = 512
    block_size: int = 16
    prefix_sharing: bool = True
    speculate: bool = False

    def __post_init__(self) -> None:
        for name, least in (("cache_bytes", 1), ("max_running", 1), ("max_waiting", 0), ("block_size", 1)):
            if getattr(self, name) < least:
                raise SoliError(f"the engine's {name} is {getattr(self, name)}: give {least} or more")
        if self.tokens_per_step < self.max_running:
            raise SoliError(
                f"the engine's tokens_per_step is {self.tokens_per_step}, but each of {self.max_running} running "
                f"requests reads a token in a step: give {self.max_running} or more"
            )


@dataclass(frozen=True)
class EngineStats:
    """How the engine stands; counts of tokens and events are since its start."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    cache_bytes: int
    steps: int
    prompt_tokens: int
    completion_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    drafted: int
    accepted: int
    expert_load: tuple[tuple[int, ...], ...]  # per MoE layer, how often each expert was chosen


class QueueFull(SoliError):
    """As many requests wait as may: come back later."""


class Refused(SoliError):
    """A request that can never run. `field`: what of the Request is to blame; `too_long`: for the model's positions."""

    def __init__(self, field: str, message: str, too_long: bool = False) -> None:
        super().__init__(message)
        self.field, self.too_long = field, too_long
