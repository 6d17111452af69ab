"""Speculation: drafted tokens are kept with a probability that leaves the output distribution as it was.

A draft d was drawn from q; the model, which has now read it, says p for the same place. It is kept with probability
min(1, p(d) / q(d)); otherwise the token is drawn from max(0, p - q), normalised, and the drafts after it are void. When
all are kept, the last row of logits gives one token more. The tokens then follow p exactly (Leviathan et al. 2023,
algorithm 1 and appendix A.1; Chen et al. 2023). Greedy is the same rule: p and q are certainties, and the tokens are
those of decoding without drafts. p and q are what remains after penalties, constraint, temperature and filters, each
draft counted before the next is looked at.

Every number drawn belongs to the request's seed and the token's place. A text thus depends on its seed and on
which tokens were drafted: whoever speculates does so for a request from its first token to its last, and keeps a draft
that has not been verified through a preemption.

Shapes: B requests, K drafts of one request, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from soli.engine.distribution import Distribution, distribution
from soli.engine.logprobs import token_logprob
from soli.engine.sampler import PROPOSE, REPLACE, TEST, Drawn, SamplerState, not_finite
from soli.errors import SoliError


@dataclass(frozen=True)
class Draft:
    """A guess at the next token, and the distribution that it was drawn from."""

    token: int
    distribution: Distribution


@dataclass(frozen=True)
class Verified:
    """What one pass over drafts gave: the tokens to accept, in order; the first `kept` of them are drafts.

    The last element is a SoliError when the request cannot go on (logits not finite, dead end of its constraint).
    """

    drawn: tuple[Drawn | SoliError, ...]
    kept: int


def propose(logits_BV: Tensor, states: Sequence[SamplerState]) -> list[Draft | SoliError]:
    """A draft of each request's next token from the drafting module's logits; the states are left as they are.

    To draft further ahead, `accept` the draft, propose again, and `rollback` before `verify`.
    """
    drafts: list[Draft | SoliError] = []
    for logits_V, state in zip(_rows(logits_BV), states, strict=True):
        try:
            guess = _distribution(logits_V, state)
            drafts.append(Draft(guess.draw(state.uniform(PROPOSE)), guess))
        except SoliError as error:
            drafts.append(error)
    return drafts


def verify(
    logits_KV: Tensor,
    drafts: Sequence[Draft],
    state: SamplerState,
    stop_ids: Collection[int] = (),
    logprobs: int | None = None,
) -> Verified:
    """The next tokens of one request from the model's logits (K+1 rows): before each draft, and after the last.

    Ends early with a token of `stop_ids` and where the constraint leaves nothing to say. `state` stands before the
    first draft, and does so afterwards (unless the result ends with a SoliError): the caller accepts the tokens.
    """
    drawn: list[Drawn | SoliError] = []
    kept, before = 0, state.position
    try:
        for place, logits_V in enumerate(_rows(logits_KV)):
            wanted = _distribution(logits_V, state)
            token, keep = _next(wanted, drafts[place] if place < len(drafts) else None, state)
            drawn.append(Drawn(token, None if logprobs is None else token_logprob(logits_V, token, logprobs)))
            kept += keep
            if not keep or token in stop_ids:
                break
            state.accept(token)
            if state.finished:
                break
        state.rollback(state.position - before)
    except SoliError as error:
        drawn.append(error)
    return Verified(tuple(drawn), kept)


def _next(wanted: Distribution, draft: Draft | None, state: SamplerState) -> tuple[int, bool]:
    """The token of one place and whether it is the draft."""
    if draft is None:
        return wanted.draw(state.uniform()), False
    if state.uniform(TEST) * draft.distribution.probability(draft.token) < wanted.probability(draft.token):
        return draft.token, True
    return remainder(wanted, draft.distribution).draw(state.uniform(REPLACE)), False


def remainder(wanted: Distribution, guess: Distribution) -> Distribution:
    """max(0, p - q) as a distribution; p itself where rounding leaves nothing of it."""
    guessed_V = np.zeros(max(int(wanted.tokens_K[-1]), int(guess.tokens_K[-1])) + 1)
    guessed_V[guess.tokens_K] = guess.probabilities_K
    left_K = wanted.probabilities_K - guessed_V[wanted.tokens_K]
    some_K = left_K > 0
    if not some_K.any():
        return wanted
    return Distribution(wanted.tokens_K[some_K], left_K[some_K] / left_K[some_K].sum())


def _distribution(logits_V: NDArray[np.float32], state: SamplerState) -> Distribution:
    if not np.isfinite(logits_V).all():
        raise not_finite()
    return distribution(state.processed(logits_V), state.params)


def _rows(logits_BV: Tensor) -> NDArray[np.float32]:
    rows_BV: NDArray[np.float32] = logits_BV.cpu().float().numpy()
    return rows_BV
