"""From logits to the next token of many requests, each with its own parameters, counts and random numbers.

Penalties and bias change a request's logits, in this order:

    repetition r   logit / r where positive, logit * r where negative, for tokens of the prompt or of the answer
                   (Keskar et al. 2019, section 4.1; `transformers`' RepetitionPenaltyLogitsProcessor)
    frequency f    logit - f * (times the token was sampled)            both over the answer alone, as in
    presence p     logit - p * (1 if it was sampled at all)             OpenAI's API reference
    bias b         logit + b

so that the repetition penalty sees the sign of the model's own logit. The result becomes a distribution: temperature,
then top-k, top-p and min-p, in the order of `transformers`, each filter over what the one before left. A filter keeps
every token at or above a weight, so that of tokens with equal weights all are kept or none, and the outcome does not
depend on how ties sort. One row at a time, in float64: a row's rounding does not depend on its neighbours.

The token is drawn with one uniform number that depends on the request's seed and the token's position in the answer
alone: a neighbour in the batch, a preemption or a drafted token that was rejected cannot change what comes later. Rows
that are greedy and unchanged are one argmax. Rejects logits that are not finite.

Log-probabilities are those of the model itself: log softmax of its logits, before penalties, bias, temperature and
filters, as vLLM gives them by default ("raw_logprobs").

Shapes: B requests, V vocabulary, K tokens that pass the filters.
"""

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from soli.arguments import checks_arguments
from soli.engine.constraint import Constraint
from soli.errors import SoliError
from soli.sections import shown

LARGEST_LOGIT = float(np.finfo(np.float32).max)
NOT_FINITE = "the model's logits are not finite: its weights are broken, or float16/bfloat16 overflowed"
BLOCK = 1024  # probabilities summed at once while a token is drawn
SMALLEST = float(np.finfo(np.float64).tiny)  # of weights, where the likeliest token's is 1: less is never drawn
DRAW, CHOICE, PROPOSE, TEST, REPLACE = range(5)
"""What random bits are for: a token of the answer, the seed of another answer to the same prompt, and speculation's
drafts, their test and their replacement (speculation.py)."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave the vocabulary whole.

    Penalties of 1 (repetition) and 0 (presence, frequency) change nothing; `logit_bias` adds to the logits of the
    tokens it names. Definitions and order: above. seed None draws a new one for every request.
    Rejects values outside their range (OpenAI's where it states one) with a SoliError.
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
        for item in fields(self):
            value, kind = getattr(self, item.name), Integral if item.name in ("top_k", "seed") else Real
            is_unset = item.name == "logit_bias" or (item.name == "seed" and value is None)
            if not is_unset and (isinstance(value, bool) or not isinstance(value, kind)):
                noun = "whole number" if kind is Integral else "number"
                raise SoliError(f"{item.name} is {shown(value)}: give a {noun}")
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
        for name, valid, valid_values in checks:
            if not valid:
                raise SoliError(f"{name} is {getattr(self, name)}: give {valid_values}")
        for token, bias in self.logit_bias.items():
            if not (token >= 0 and -100 <= bias <= 100):
                raise SoliError(f"logit_bias of token {token} is {bias}: give token ids and numbers from -100 to 100")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def changes_logits(self) -> bool:
        """Whether any penalty or bias is set."""
        neutral = self.repetition_penalty == 1 and self.presence_penalty == self.frequency_penalty == 0
        return not neutral or bool(self.logit_bias)

    def for_choice(self, choice: int) -> "SamplingParams":
        """The parameters of answer `choice` of several to one prompt: its seed is derived from this one's, which choice
        0 keeps."""
        if choice == 0 or self.seed is None:
            return self
        return replace(self, seed=_philox(self.seed, choice, CHOICE) >> 1)


SamplingParams.__init__ = checks_arguments(  # type: ignore[method-assign]
    "soli.SamplingParams",
    dict.fromkeys(
        ("max_tokens", "max_new_tokens", "n", "stop", "stop_token_ids", "logprobs", "ignore_eos"),
        "it is an argument of generate, beside sampling",
    ),
)(SamplingParams.__init__)

GREEDY = SamplingParams()


@dataclass(frozen=True)
class Distribution:
    """The tokens that can be drawn, in ascending order, and their probabilities, all above 0 and 1 in sum."""

    tokens_K: NDArray[np.int64]
    probabilities_K: NDArray[np.float64]

    def draw(self, uniform: float) -> int:
        """The token at `uniform` (0 up to but not 1) of the cumulative distribution."""
        # In blocks, because a running sum over a whole vocabulary takes longer than all else here together.
        cumulative = np.add.reduceat(self.probabilities_K, np.arange(0, len(self.tokens_K), BLOCK)).cumsum()
        target = uniform * float(cumulative[-1])  # the sum is 1 but for rounding
        block = _index_at(cumulative, target)
        before = float(cumulative[block - 1]) if block else 0.0
        inside = self.probabilities_K[block * BLOCK : (block + 1) * BLOCK].cumsum()
        return int(self.tokens_K[block * BLOCK + _index_at(inside, target - before)])

    def probability(self, token: int) -> float:
        """Probability of one token; 0 for one that was filtered out."""
        index = int(np.searchsorted(self.tokens_K, token))
        present = index < len(self.tokens_K) and int(self.tokens_K[index]) == token
        return float(self.probabilities_K[index]) if present else 0.0


def distribution(
    logits_V: NDArray[np.float32], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Distribution:
    """The distribution over processed logits, at least one of which is finite; -inf is a token that must not come.

    Temperature 0 gives the likeliest token alone, the lowest of equals; `top_k` 0, `top_p` 1, `min_p` 0: no filter.
    """
    if temperature == 0:
        return Distribution(np.array([logits_V.argmax()]), np.ones(1))
    candidates = _top_k(logits_V, top_k) if 0 < top_k < len(logits_V) else slice(None)
    # Relative to the largest logit, so that a temperature near 0 cannot overflow to inf - inf.
    weights_K = logits_V[candidates].astype(np.float64)
    weights_K -= float(logits_V.max())
    with np.errstate(over="ignore"):
        weights_K /= temperature
    np.exp(weights_K, out=weights_K)
    nucleus = _nucleus_threshold(weights_K, top_p) if top_p < 1 else 0.0
    index_K = np.flatnonzero(weights_K >= max(nucleus, min_p, SMALLEST))  # the likeliest token's weight is 1
    weights_K = weights_K[index_K]
    weights_K /= weights_K.sum()
    return Distribution(index_K if isinstance(candidates, slice) else candidates[index_K], weights_K)


def _index_at(cumulative: NDArray[np.float64], target: float) -> int:
    """The index whose share, [before, after), contains `target`."""
    return min(int(np.searchsorted(cumulative, target, side="right")), len(cumulative) - 1)


def _top_k(logits_V: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The tokens at or above the k-th largest logit, 0 < k <= V, in ascending order."""
    return np.flatnonzero(logits_V >= np.partition(logits_V, -k)[-k])


def _nucleus_threshold(weights_K: NDArray[np.float64], top_p: float) -> float:
    """The smallest weight in the smallest set of largest weights that holds `top_p` of their sum."""
    total = float(weights_K.sum())
    # The weights below (1 - top_p) of the mean sum to less than 1 - top_p of the total: no need to sort them.
    candidates = weights_K[weights_K >= (1 - top_p) * total / len(weights_K) * (1 - 1e-9)]
    descending = np.sort(candidates)[::-1]
    last = int(np.searchsorted(descending.cumsum(), top_p * total))
    return float(descending[min(last, len(descending) - 1)])


class Penalties:
    """The penalties and bias of one request, with the counts of its tokens."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab: int) -> None:
        self._params = params
        self._bias_tokens = np.array(list(params.logit_bias), dtype=np.int64)
        self._biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._counts_V = np.zeros(vocab, dtype=np.int32)
        self._prompt_V = np.zeros(vocab, dtype=np.bool_)
        self._prompt_V[np.asarray(prompt_ids, dtype=np.int64)] = True

    def count(self, token: int, times: int) -> None:
        """Counts `times` more (or, below 0, fewer) of this token in the answer."""
        self._counts_V[token] += times

    @np.errstate(over="ignore")
    def apply(self, logits_V: NDArray[np.float32]) -> None:
        """Changes the logits in place, in float32; finite ones stay finite."""
        params = self._params
        sampled_V = self._counts_V > 0
        if params.repetition_penalty != 1:
            tokens = np.flatnonzero(self._prompt_V | sampled_V)
            present = logits_V[tokens]
            logits_V[tokens] = np.where(
                present < 0, present * params.repetition_penalty, present / params.repetition_penalty
            )
        if params.frequency_penalty or params.presence_penalty:
            tokens = np.flatnonzero(sampled_V)
            logits_V[tokens] -= params.frequency_penalty * self._counts_V[tokens] + params.presence_penalty
        logits_V[self._bias_tokens] += self._biases
        # Infinite logits would make every probability undefined.
        np.clip(logits_V, -LARGEST_LOGIT, LARGEST_LOGIT, out=logits_V)


class SamplerState:
    """The sampling state of one request: its parameters, its tokens so far and their counts, its constraint. None of
    `end_ids` is among the first `min_tokens`.

    Rejects a bias for a token that the vocabulary does not have.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab: int,
        constraint: Constraint | None = None,
        min_tokens: int = 0,
        end_ids: Collection[int] = (),
    ) -> None:
        largest = max(params.logit_bias, default=0)
        if largest >= vocab:
            raise SoliError(f"logit_bias names token {largest}, but the model's vocabulary ends at {vocab - 1}")
        self.params = params
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._tokens: list[int] = []
        self._penalties = Penalties(params, prompt_ids, vocab) if params.changes_logits else None
        self._constraint = constraint
        self._min_tokens = min_tokens if end_ids else 0
        self._end_ids = np.array(sorted(end_ids), dtype=np.int64)

    @property
    def position(self) -> int:
        """How many tokens were accepted: the position in the answer of the next token."""
        return len(self._tokens)

    @property
    def is_argmax(self) -> bool:
        """Whether the next token is that of the model's largest logit."""
        return self.params.temperature == 0 and self._logits_are_final

    @property
    def _logits_are_final(self) -> bool:
        """Whether nothing changes the model's logits."""
        return self._penalties is None and self._constraint is None and self.position >= self._min_tokens

    @property
    def finished(self) -> bool:
        """Whether the constraint is satisfied and nothing may follow."""
        return self._constraint is not None and self._constraint.finished

    def accept(self, token: int) -> None:
        """Appends a token to the answer; SoliError when the constraint excludes it."""
        if self._constraint is not None:
            self._constraint.accept(token)
        self._tokens.append(token)
        if self._penalties is not None:
            self._penalties.count(token, 1)

    def rollback(self, tokens: int) -> None:
        """Removes the last `tokens` tokens from the answer."""
        if self._constraint is not None:
            self._constraint.rollback(tokens)
        for _ in range(tokens):
            token = self._tokens.pop()
            if self._penalties is not None:
                self._penalties.count(token, -1)

    def process(self, logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits of the next token after penalties and bias, -inf where the constraint excludes it or the answer
        may not end yet.

        The argument is not changed. SoliError where the constraint allows no token.
        """
        if self._logits_are_final:
            return logits_V
        logits_V = logits_V.copy()
        if self._penalties is not None:
            self._penalties.apply(logits_V)
        if self._constraint is not None:
            logits_V[~self._constraint.mask()] = -np.inf
        if self.position < self._min_tokens:
            logits_V[self._end_ids] = -np.inf
        return logits_V

    def distribution(self, logits_V: NDArray[np.float32]) -> Distribution:
        """The distribution of the next token, of logits that are finite."""
        params = self.params
        return distribution(self.process(logits_V), params.temperature, params.top_k, params.top_p, params.min_p)

    def uniform(self, purpose: int = DRAW) -> float:
        """The number in [0, 1) of the seed, the next token's position and the purpose."""
        return (_philox(self._seed, self.position, purpose) >> 11) * 2.0**-53


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and the likeliest tokens with theirs, best first (the lower id of equals)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits_V: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
    """Of `token` and of the `count` likeliest tokens, computed in float64."""
    double_V = logits_V.astype(np.float64)
    largest = double_V.max()
    log_sum = largest + np.log(np.exp(double_V - largest).sum())
    top = _likeliest(logits_V, min(count, len(logits_V))) if count else []
    return TokenLogprob(
        token,
        float(double_V[token] - log_sum),
        tuple((top_token, float(double_V[top_token] - log_sum)) for top_token in top),
    )


def _likeliest(logits_V: NDArray[np.float32], count: int) -> list[int]:
    """The tokens of the `count` largest logits, largest first."""
    tokens = _top_k(logits_V, count)
    order = np.argsort(-logits_V[tokens], kind="stable")
    likeliest: list[int] = tokens[order][:count].tolist()
    return likeliest


@dataclass(frozen=True)
class SampledToken:
    """One request's next token, and its log-probability if the request asks for it."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Draft:
    """A guess at the next token, and the distribution that it was sampled from (speculation.py)."""

    token: int
    distribution: Distribution


def sample(
    logits_BV: Tensor, states: Sequence[SamplerState], logprobs: Sequence[int | None] | None = None
) -> list[SampledToken | SoliError]:
    """One token for each row of logits, row b for `states[b]`. No state changes before `accept`.

    `logprobs[b]`: None for none, or how many of the likeliest tokens to list beside the sampled one. A row that cannot
    be sampled (its logits are not finite, or its constraint allows nothing) gives its SoliError; the other rows are not
    affected.
    """
    rows_BV = logits_BV.cpu().float().numpy()  # numpy's argmax is several times as fast as torch's here
    likeliest_B = rows_BV.argmax(axis=-1)  # the lowest of equals
    finite_B = np.isfinite(rows_BV.max(axis=-1)) & np.isfinite(rows_BV.min(axis=-1))  # both are NaN where any is
    counts = logprobs or [None] * len(states)
    sampled: list[SampledToken | SoliError] = []
    for row_V, state, likeliest, finite, count in zip(rows_BV, states, likeliest_B, finite_B, counts, strict=True):
        try:
            if not finite:
                raise SoliError(NOT_FINITE)
            token = int(likeliest) if state.is_argmax else state.distribution(row_V).draw(state.uniform())
            sampled.append(SampledToken(token, None if count is None else token_logprob(row_V, token, count)))
        except SoliError as error:
            sampled.append(error)
    return sampled


def _philox(seed: int, position: int, purpose: int) -> int:
    """64 random bits of three numbers: Philox4x64-10 (Salmon et al. 2011), counter-based."""
    return int(np.random.Philox(key=seed % 2**64, counter=[position, purpose, 0, 0]).random_raw())
