"""Speculation: drafted tokens are accepted with a probability that leaves the output distribution unchanged.

A draft d was sampled from q; the model, which has computed it since, gives p for the same position. It is accepted with
probability min(1, p(d) / q(d)); otherwise the token is sampled from max(0, p - q), normalised, and the drafts after it
are void. When all are accepted, the last row of logits gives one token more. The tokens then follow p exactly
(Leviathan et al. 2023, algorithm 1 and appendix A.1; Chen et al. 2023). Greedy is the same rule: p and q are
certainties, and the tokens are those of decoding without drafts. p and q are taken after penalties, constraint,
temperature and filters, each draft counted before the next is verified.

Drafts come from the model's own MTP module (section 5.4.3). It has latents of its own, in the same KV blocks, as one
layer more. Its entry for a position is made of the main model's hidden state there and of the token that follows, so it
is written when that token is known: after a step has sampled. The module computes every token that the main model
computes.

Every random number is a function of the request's seed and the token's position. A text thus depends on its seed and
on which tokens were drafted: a request is speculated from its first token to its last, and a draft that has not been
verified survives a preemption.

Where experts are read from disk, a draft's tokens need experts of their own, and so does the module. Whether that pays
is decided from the times of steps (`DraftingGain`), for requests whose text does not depend on it: greedy ones, and
those without a seed.

Shapes: B requests, K drafts of one request, V vocabulary, T tokens of a step, D hidden.
"""

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soli.engine.latent_cache import MAX_ABSORBED_TOKENS, LatentCache
from soli.engine.request import Request
from soli.engine.runner import Runner
from soli.engine.sampler import (
    NOT_FINITE,
    PROPOSE,
    REPLACE,
    TEST,
    Distribution,
    Draft,
    SampledToken,
    SamplerState,
    token_logprob,
)
from soli.engine.scheduler import ScheduledTokens, SequenceState
from soli.errors import SoliError
from soli.model.transformer import Transformer


@dataclass(frozen=True)
class VerifiedTokens:
    """The tokens to accept, in order; the first `accepted_drafts` of them are drafts.

    The last element is a SoliError when the request cannot continue (logits not finite, dead end of its constraint).
    """

    tokens: tuple[SampledToken | SoliError, ...]
    accepted_drafts: int


def propose(logits_BV: Tensor, states: Sequence[SamplerState]) -> list[Draft | SoliError]:
    """A draft of each request's next token from the drafting module's logits; the states do not change.

    To draft further ahead, `accept` the draft, propose again, and `rollback` before `verify`.
    """
    drafts: list[Draft | SoliError] = []
    for logits_V, state in zip(_rows(logits_BV), states, strict=True):
        try:
            proposal = _distribution(logits_V, state)
            drafts.append(Draft(proposal.draw(state.uniform(PROPOSE)), proposal))
        except SoliError as error:
            drafts.append(error)
    return drafts


def verify(
    logits_KV: Tensor,
    drafts: Sequence[Draft],
    state: SamplerState,
    stop_ids: Collection[int] = (),
    logprobs: int | None = None,
) -> VerifiedTokens:
    """The next tokens of one request from the model's logits (K+1 rows): before each draft, and after the last.

    Ends early with a token of `stop_ids` and where the constraint allows no more text. `state` is that before the first
    draft, also afterwards (unless the result ends with a SoliError): the caller accepts the tokens.
    """
    tokens: list[SampledToken | SoliError] = []
    accepted_drafts = 0
    start = state.position
    try:
        for index, logits_V in enumerate(_rows(logits_KV)):
            target = _distribution(logits_V, state)
            token, is_draft = _next_token(target, drafts[index] if index < len(drafts) else None, state)
            tokens.append(SampledToken(token, None if logprobs is None else token_logprob(logits_V, token, logprobs)))
            accepted_drafts += is_draft
            if not is_draft or token in stop_ids:
                break
            state.accept(token)
            if state.finished:
                break
        state.rollback(state.position - start)
    except SoliError as error:
        tokens.append(error)
    return VerifiedTokens(tuple(tokens), accepted_drafts)


def _next_token(target: Distribution, draft: Draft | None, state: SamplerState) -> tuple[int, bool]:
    """The token of one position and whether it is the draft."""
    if draft is None:
        return target.draw(state.uniform()), False
    if state.uniform(TEST) * draft.distribution.probability(draft.token) < target.probability(draft.token):
        return draft.token, True
    return remainder(target, draft.distribution).draw(state.uniform(REPLACE)), False


def remainder(target: Distribution, proposal: Distribution) -> Distribution:
    """max(0, p - q) as a distribution; p itself where rounding leaves nothing of it."""
    proposal_V = np.zeros(max(int(target.tokens_K[-1]), int(proposal.tokens_K[-1])) + 1)
    proposal_V[proposal.tokens_K] = proposal.probabilities_K
    difference_K = target.probabilities_K - proposal_V[target.tokens_K]
    positive_K = difference_K > 0
    if not positive_K.any():
        return target
    return Distribution(target.tokens_K[positive_K], difference_K[positive_K] / difference_K[positive_K].sum())


def _distribution(logits_V: NDArray[np.float32], state: SamplerState) -> Distribution:
    if not np.isfinite(logits_V).all():
        raise SoliError(NOT_FINITE)
    return state.distribution(logits_V)


def _rows(logits_BV: Tensor) -> NDArray[np.float32]:
    rows_BV: NDArray[np.float32] = logits_BV.cpu().float().numpy()
    return rows_BV


class DraftingGain:
    """Whether drafting pays, from the latest steps in which every request had a token to decode.

    A step with drafts costs more than one without, and the module's pass comes on top; it gives more tokens. One step
    in PROBE_EVERY is computed without drafts, so that both are measured while experts come and go. Drafting that does
    not pay is given up, and tried anew by a request that begins after RETRY_TOKENS more.
    """

    PROBE_EVERY: Final = 4
    STEPS: Final = 32  # of each kind, that count
    MIN_STEPS: Final = 6  # of each kind, before it is decided
    RETRY_TOKENS: Final = 2048

    def __init__(self) -> None:
        self._seconds_per_token: dict[bool, deque[float]] = {kind: deque(maxlen=self.STEPS) for kind in (True, False)}
        self._steps = 0
        self._tokens_left = 0  # until drafting is tried again

    @property
    def pays(self) -> bool:
        """Whether to draft, as far as is known."""
        with_drafts, without = self._seconds_per_token[True], self._seconds_per_token[False]
        if min(len(with_drafts), len(without)) < self.MIN_STEPS:
            return self._tokens_left == 0
        return mean(with_drafts) < mean(without)

    @property
    def probes(self) -> bool:
        """Whether the next step is to be one without drafts."""
        return self._steps % self.PROBE_EVERY == 0

    def observe(self, requests: int, drafts: int, tokens: int, seconds: float, module_seconds: float) -> None:
        """A step of so many requests verified `drafts` and gave `tokens`; both models took so long."""
        self._steps += 1
        self._tokens_left = max(0, self._tokens_left - tokens)
        if drafts == requests:
            self._seconds_per_token[True].append((seconds + module_seconds) / tokens)
        elif not drafts:
            self._seconds_per_token[False].append(seconds / tokens)

    def give_up(self) -> None:
        """Forget what was measured, and do without for a while."""
        for seconds in self._seconds_per_token.values():
            seconds.clear()
        self._tokens_left = self.RETRY_TOKENS


def depends_on_drafts(request: Request) -> bool:
    """Whether its text changes with which tokens were drafted."""
    return request.sampling.temperature > 0 and request.sampling.seed is not None


class Drafter:
    """Drafts one token ahead with the first MTP module of `model`."""

    def __init__(self, model: Transformer, cache: LatentCache, gain: DraftingGain | None = None) -> None:
        self._model, self._cache, self._gain = model, cache, gain
        self._module_seconds = 0.0  # of the latest step

    def begins(self, request: Request) -> bool:
        """Whether to draft for a request, from its first token on."""
        return self._gain is None or depends_on_drafts(request) or self._gain.pays

    def observe(self, parts: Sequence[ScheduledTokens], drafts: int, tokens: int, seconds: float) -> None:
        """A step of `parts`, each of one request that decodes, verified `drafts` and gave `tokens`; the model took so
        long. Where drafting does not pay, requests that can do without go on without."""
        if self._gain is None:
            return
        self._gain.observe(len(parts), drafts, tokens, seconds, self._module_seconds)
        if not self._gain.pays:
            adaptable = [part.sequence for part in parts if part.sequence.speculates]
            adaptable = [sequence for sequence in adaptable if not depends_on_drafts(sequence.request)]
            for sequence in adaptable:
                sequence.stop_speculating()
            if adaptable:
                self._gain.give_up()

    def draft(
        self, runner: Runner, parts: Sequence[ScheduledTokens], drafting: Collection[SequenceState], hidden_TD: Tensor
    ) -> None:
        """Run the module over `parts`, the tokens of a step that their sequences keep, whose hidden states are in
        `hidden_TD`; draft what follows the last token of the sequences in `drafting`."""
        start = time.perf_counter()
        parts = [part for part in parts if part.sequence.speculates]
        if parts:
            self._draft(runner, parts, self._selected(drafting), hidden_TD)
        self._module_seconds = time.perf_counter() - start

    def _selected(self, drafting: Collection[SequenceState]) -> list[SequenceState]:
        """Those to draft for in this step."""
        probe = self._gain is not None and self._gain.probes
        return [one for one in drafting if one.speculates and not (probe and not depends_on_drafts(one.request))]

    def _draft(
        self, runner: Runner, parts: Sequence[ScheduledTokens], drafting: Collection[SequenceState], hidden_TD: Tensor
    ) -> None:
        parts = sorted(parts, key=lambda part: part.count > MAX_ABSORBED_TOKENS)
        output_TD = self._run_module(runner, parts, hidden_TD)
        ends = accumulate(part.count for part in parts)
        last_rows = {part.sequence: end - 1 for part, end in zip(parts, ends, strict=True) if part.sequence in drafting}
        if not last_rows:
            return
        logits_BV = self._model.head(output_TD[torch.tensor([*last_rows.values()], device=hidden_TD.device)])
        drafts = propose(logits_BV, [sequence.sampler for sequence in last_rows])
        for sequence, draft in zip(last_rows, drafts, strict=True):
            if isinstance(draft, Draft):  # else decoding continues without one and reports the error itself
                sequence.drafts = [draft]

    def _run_module(self, runner: Runner, parts: Sequence[ScheduledTokens], hidden_TD: Tensor) -> Tensor:
        device = hidden_TD.device
        starts, counts = [part.start for part in parts], [part.count for part in parts]
        step = self._cache.step([part.sequence.row for part in parts], starts, counts, device)
        next_ids = [token for part in parts for token in part.sequence.ids[part.start + 1 :][: part.count]]
        rows = [row for part in parts for row in range(part.row, part.row + part.count)]
        next_ids_T = torch.tensor(next_ids, dtype=torch.int64).to(device)
        output = runner.draft(hidden_TD[torch.tensor(rows, device=device)], next_ids_T, step.positions_T, step)
        return output.hidden_BTD[0]
