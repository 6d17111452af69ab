"""Beam search: of many texts the likeliest one, where greedy decoding takes the likeliest next token.

A request has `beam_width` beams, its unfinished texts. In each step every continuation of every beam by one token is
ranked by the sum of its log-probabilities. Those among the first `beam_width` that end with a stop token, or have as
many tokens as allowed, are finished hypotheses; the best others are the beams of the next step. A hypothesis scores

    log P(text | prompt) / length ** length_penalty,

its length in new tokens, with the stop token. The `beam_width` best are kept. Definitions and ends are those of
`transformers`' generate(num_beams=..., do_sample=False). Of equals the lower beam comes first, then the lower token.

Shapes: N beams of all requests in a step, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from soli.engine.constraint import ConstraintSpec
from soli.engine.sampler import SamplingParams
from soli.errors import SoliError
from soli.model.router import Routing
from soli.sections import Bounds, convert, reject

MAX_LENGTH_PENALTY: Final = 10.0  # either way: a length to its power must be a finite number


class DecodingOptions(Protocol):
    """Those of a request that a beam search has none of."""

    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def stop(self) -> Collection[str]: ...
    @property
    def logprobs(self) -> int | None: ...
    @property
    def prompt_logprobs(self) -> int | None: ...
    @property
    def constraint(self) -> ConstraintSpec | None: ...
    @property
    def min_new_tokens(self) -> int: ...


def options_beams_lack(options: DecodingOptions) -> list[str]:
    """The names of those that are in use."""
    used = {
        "temperature": options.sampling.temperature > 0,
        "penalties and logit_bias": options.sampling.changes_logits,
        "stop": options.stop,
        "logprobs": options.logprobs is not None,
        "prompt_logprobs": options.prompt_logprobs is not None,
        "constraint": options.constraint is not None,
        "min_new_tokens": options.min_new_tokens,
    }
    return [name for name, is_used in used.items() if is_used]


@dataclass(frozen=True)
class BeamSearchParams:
    """How to search. `beam_width`: texts that are continued at the same time (`num_beams` of transformers).
    `length_penalty`: above 0 favours longer texts, 0 compares sums of log-probabilities, 1 their means.
    `early_stopping`: True ends as soon as `beam_width` hypotheses are finished; False where the best beam scores no
    more than the last of them, at its present length; "never" compares it at the longest length instead.

    SoliError for a value out of its range.
    """

    beam_width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        width = convert("beam_width", self.beam_width, Annotated[int, Bounds(at_least=1)])
        bounds = Bounds(at_least=-MAX_LENGTH_PENALTY, at_most=MAX_LENGTH_PENALTY)
        penalty = convert("length_penalty", self.length_penalty, Annotated[float, bounds])
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            reject("early_stopping", self.early_stopping, 'it must be true, false or "never"')
        object.__setattr__(self, "beam_width", width)
        object.__setattr__(self, "length_penalty", penalty)

    def score(self, log_probability: float, length: int) -> float:
        """The score of a text of so many new tokens."""
        return log_probability / length**self.length_penalty

    def check_vocabulary(self, vocab_size: int, stop_ids: Collection[int]) -> None:
        """SoliError where the continuations of one text are too few for so many beams."""
        widest = vocab_size // (1 + max(1, len(stop_ids)))
        if self.beam_width > widest:
            raise SoliError(
                f"beam_width is {self.beam_width}, but with a vocabulary of {vocab_size} and {len(stop_ids)} stop "
                f"tokens a text has at most {widest} beams: give fewer"
            )


def beam_search_params(
    default: BeamSearchParams,
    beam_width: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | Literal["never"] | None = None,
) -> BeamSearchParams:
    """The default with the values that are given."""
    values: dict[str, Any] = {"beam_width": beam_width, "length_penalty": length_penalty}
    values["early_stopping"] = early_stopping
    return replace(default, **{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Hypothesis:
    """A finished text of a beam search. `ids`: the new tokens without the stop token; `log_probability`: natural
    logarithm, the stop token's included; `score`: what hypotheses are ranked by; `routing`: as of an Answer."""

    ids: tuple[int, ...]
    text: str
    log_probability: float
    score: float
    finish_reason: Literal["stop", "length"]
    routing: tuple[Routing, ...] | None = None


class Continuation(NamedTuple):
    """A beam, by its place, with one more token; `log_probability`: of all its new tokens."""

    log_probability: float
    beam: int
    token: int


def likeliest_continuations(
    logits_NV: Tensor, log_probabilities: Sequence[float], count: int
) -> list[list[tuple[float, int]] | None]:
    """For each beam its `count` likeliest continuations, or more where the last are equal: log-probability of the
    whole text, in float32, and token, by token. None where logits are not finite. `log_probabilities`: of the beams."""
    sums_N1 = torch.tensor(log_probabilities, dtype=torch.float32, device=logits_NV.device)[:, None]
    totals_NV = logits_NV.float().log_softmax(-1) + sums_N1
    least_N1 = totals_NV.topk(min(count, totals_NV.shape[1])).values[:, -1:]
    rows, tokens = (totals_NV >= least_N1).nonzero(as_tuple=True)
    finite = logits_NV.isfinite().all(-1).tolist()
    continuations: list[list[tuple[float, int]] | None] = [[] if one else None for one in finite]
    for row, token, total in zip(rows.tolist(), tokens.tolist(), totals_NV[rows, tokens].tolist(), strict=True):
        if (listed := continuations[row]) is not None:
            listed.append((total, token))
    return continuations


class BeamSearch:
    """The search of one request: what is finished, and which beams continue.

    `finish(continuation, score, finish_reason)` makes the hypothesis of a text that ends here.
    """

    def __init__(
        self,
        params: BeamSearchParams,
        stop_ids: frozenset[int],
        max_new_tokens: int,
        finish: Callable[[Continuation, float, Literal["stop", "length"]], Hypothesis],
    ) -> None:
        self._params, self._stop_ids, self._max_new_tokens, self._finish = params, stop_ids, max_new_tokens, finish
        self._length = 0  # of the beams, in new tokens
        self.hypotheses: list[Hypothesis] = []  # the best first
        # So many that enough are left where the others end.
        self.considered = params.beam_width * (1 + max(1, len(stop_ids)))

    def advance(self, continuations: list[Continuation]) -> list[Continuation]:
        """The beams of the next step, the likeliest first; none where the search has ended. `continuations`: of every
        beam the `considered` likeliest."""
        width = self._params.beam_width
        self._length += 1
        is_last = self._length == self._max_new_tokens
        ranked = sorted(continuations, key=lambda one: (-one.log_probability, one.beam, one.token))[: self.considered]
        for one in ranked[:width]:
            is_stop = one.token in self._stop_ids
            if is_stop or is_last:
                score = self._params.score(one.log_probability, self._length)
                self.hypotheses.append(self._finish(one, score, "stop" if is_stop else "length"))
        self.hypotheses = sorted(self.hypotheses, key=lambda one: -one.score)[:width]
        beams = [one for one in ranked if one.token not in self._stop_ids][:width]
        return [] if is_last or self._is_decided(beams[0].log_probability) else beams

    def _is_decided(self, log_probability: float) -> bool:
        """Whether no beam, the likeliest of which has this log-probability, is expected to be among the best."""
        params = self._params
        if len(self.hypotheses) < params.beam_width:
            return False
        if params.early_stopping is True:
            return True
        reaches_end = params.early_stopping == "never" and params.length_penalty > 0
        length = self._max_new_tokens if reaches_end else self._length
        return params.score(log_probability, length) <= self.hypotheses[-1].score
