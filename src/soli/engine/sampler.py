"""From logits to the next token of many requests, each with its own parameters, counts and random stream.

A request's logits are changed by its penalties and bias (penalties.py) and become a distribution (distribution.py).
The token is drawn with one uniform number that belongs to the request's seed and the token's place in the answer: so a
neighbour in the batch, a preemption or a drafted token that was refused cannot change what comes later. Rows that are
greedy and unchanged are one argmax. Refuses logits that are not finite.

Shapes: B requests, V vocabulary.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from soli.engine.constraint import Constraint
from soli.engine.distribution import distribution
from soli.engine.logprobs import TokenLogprob, token_logprob
from soli.engine.penalties import Penalties
from soli.errors import SoliError

DRAW, CHOICE, PROPOSE, TEST, REPLACE = range(5)
"""What random bits are for: a token of the answer, the seed of another answer to the same prompt, and speculation's
drafts, their test and their replacement (speculate.py)."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave the vocabulary whole.

    Penalties of 1 (repetition) and 0 (presence, frequency) change nothing; `logit_bias` adds to the logits of the
    tokens it names. Definitions and order: penalties.py, distribution.py. seed None draws a fresh one for every
    request. Refuses values outside their range (OpenAI's where it states one) with a SoliError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 (always the likeliest token) upward"),
            ("top_k", self.top_k >= 0, "0 for the whole vocabulary, or how many tokens to keep"),
            ("top_p", 0 < self.top_p <= 1, "a share above 0 and up to 1"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a whole number of 64 bits"),
            ("min_p", 0 <= self.min_p <= 1, "a share of the likeliest token's probability, from 0 to 1"),
            ("repetition_penalty", 0.1 <= self.repetition_penalty <= 10, "a number from 0.1 to 10; 1 changes nothing"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "a number from -2 to 2; 0 changes nothing"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "a number from -2 to 2; 0 changes nothing"),
        )
        for name, good, wanted in checks:
            if not good:
                raise SoliError(f"{name} is {getattr(self, name)}: give {wanted}")
        for token, bias in self.logit_bias.items():
            if not (token >= 0 and -100 <= bias <= 100):
                raise SoliError(f"logit_bias of token {token} is {bias}: give token ids and numbers from -100 to 100")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def changes_logits(self) -> bool:
        """Whether a penalty or a bias is in force."""
        neutral = self.repetition_penalty == 1 and self.presence_penalty == self.frequency_penalty == 0
        return not neutral or bool(self.logit_bias)

    def numbered(self, choice: int) -> "SamplingParams":
        """The parameters of answer number `choice` of several to one prompt: a seed of its own, derived from this one's
        (number 0 keeps it)."""
        if choice == 0 or self.seed is None:
            return self
        return replace(self, seed=_philox(self.seed, choice, CHOICE) >> 1)


GREEDY = SamplingParams()


class SamplerState:
    """Where one request stands: its parameters, how many tokens it has, what was counted of them, what may follow.

    Refuses a bias for a token that the vocabulary does not have.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab: int, constraint: Constraint | None = None
    ) -> None:
        largest = max(params.logit_bias, default=0)
        if largest >= vocab:
            raise SoliError(f"logit_bias names token {largest}, but the model's vocabulary ends at {vocab - 1}")
        self.params = params
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._tokens: list[int] = []
        self._penalties = Penalties(params, prompt_ids, vocab) if params.changes_logits else None
        self._constraint = constraint

    @property
    def position(self) -> int:
        """How many tokens were accepted: the place in the answer of the token drawn next."""
        return len(self._tokens)

    @property
    def plain(self) -> bool:
        """Whether the next token is simply that of the largest logit."""
        return self.params.temperature == 0 and self._penalties is None and self._constraint is None

    @property
    def finished(self) -> bool:
        """Whether the constraint is satisfied and leaves nothing to say."""
        return self._constraint is not None and self._constraint.finished

    def accept(self, token: int) -> None:
        """The answer goes on with this token; SoliError when its constraint cannot."""
        if self._constraint is not None:
            self._constraint.accept(token)
        self._tokens.append(token)
        if self._penalties is not None:
            self._penalties.count(token, 1)

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` that were accepted, as if they had never been."""
        if self._constraint is not None:
            self._constraint.rollback(tokens)
        for _ in range(tokens):
            token = self._tokens.pop()
            if self._penalties is not None:
                self._penalties.count(token, -1)

    def processed(self, logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits of the next token after penalties and bias, -inf where the constraint excludes it.

        What was given stays as it was. SoliError where the constraint has come to a dead end.
        """
        if self._penalties is None and self._constraint is None:
            return logits_V
        logits_V = logits_V.copy()
        if self._penalties is not None:
            self._penalties.apply(logits_V)
        if self._constraint is not None:
            logits_V[~self._constraint.mask()] = -np.inf
        return logits_V

    def uniform(self, purpose: int = DRAW) -> float:
        """The number in [0, 1) that belongs to the seed, the next token's place and what it is for."""
        return (_philox(self._seed, self.position, purpose) >> 11) * 2.0**-53


@dataclass(frozen=True)
class Drawn:
    """One request's next token, and its log-probability if that was asked for."""

    token: int
    logprob: TokenLogprob | None = None


def sample(
    logits_BV: Tensor, states: Sequence[SamplerState], logprobs: Sequence[int | None] | None = None
) -> list[Drawn | SoliError]:
    """One token for each row of logits, row b for `states[b]`; the states are left as they are until `accept`.

    `logprobs[b]`: None for none, or how many of the likeliest tokens to list beside the drawn one (logprobs.py). A row
    that cannot be drawn from (its logits are not finite, or its constraint allows nothing) gives its SoliError; the
    other rows are not touched by it.
    """
    rows_BV = logits_BV.cpu().float().numpy()  # numpy's argmax and sums are many times as fast as torch's here
    likeliest_B = rows_BV.argmax(axis=-1)  # the lowest of equals
    finite_B = np.isfinite(rows_BV.max(axis=-1)) & np.isfinite(rows_BV.min(axis=-1))  # both are NaN where any is
    drawn: list[Drawn | SoliError] = []
    for row, state in enumerate(states):
        token, count = int(likeliest_B[row]), logprobs[row] if logprobs is not None else None
        try:
            if not finite_B[row]:
                raise not_finite()
            if not state.plain:
                token = distribution(state.processed(rows_BV[row]), state.params).draw(state.uniform())
            drawn.append(Drawn(token, None if count is None else token_logprob(rows_BV[row], token, count)))
        except SoliError as error:
            drawn.append(error)
    return drawn


def not_finite() -> SoliError:
    """The error for logits that are NaN or infinite."""
    return SoliError("the model's logits are not finite: its weights are broken, or float16/bfloat16 overflowed")


def _philox(seed: int, position: int, purpose: int) -> int:
    """64 random bits that depend on the three numbers alone: Philox4x64-10 (Salmon et al. 2011), counter-based."""
    return int(np.random.Philox(key=seed % 2**64, counter=[position, purpose, 0, 0]).random_raw())
