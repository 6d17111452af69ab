"""Drafts by the model's own MTP module (section 5.4.3): the token after the next, from the hidden state of the last.

The module has latents of its own, in the same KV blocks, as one layer more. Its entry for a position is made of the
main model's hidden state there and of the token that follows, so it is written when that token is known: after a step
has sampled. The module computes every token that the main model computes.

Shapes: T tokens of the step, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from soli.engine.latent_cache import MAX_ABSORBED_TOKENS, LatentCache
from soli.engine.runner import Runner
from soli.engine.sampler import SamplerState
from soli.engine.scheduler import SequenceState
from soli.engine.speculate import Draft, propose
from soli.model.transformer import Transformer


@dataclass(frozen=True)
class CommittedTokens:
    """The tokens of a step that a sequence keeps: `count` from position `start`, whose hidden states begin at `row` of
    the step. `state`: of a request that wants a draft of what follows its last token."""

    sequence: SequenceState
    start: int
    count: int
    row: int
    state: SamplerState | None


class Drafter:
    """Drafts one token ahead with the first MTP module of `model`."""

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self._model, self._cache = model, cache

    def draft(self, runner: Runner, parts: Sequence[CommittedTokens], hidden_TD: Tensor) -> dict[int, Draft]:
        """Run the module over what the main model has computed; drafts by request id, for those that want one."""
        if not parts:
            return {}
        parts = sorted(parts, key=lambda part: part.count > MAX_ABSORBED_TOKENS)
        output_TD = self._run_module(runner, parts, hidden_TD)
        ends = accumulate(part.count for part in parts)
        wanting = [(end - 1, part) for end, part in zip(ends, parts, strict=True) if part.state is not None]
        if not wanting:
            return {}
        last_rows = torch.tensor([row for row, _ in wanting], device=hidden_TD.device)
        states = [part.state for _, part in wanting if part.state is not None]
        drafts = propose(self._model.head(output_TD[last_rows]), states)
        # Where no draft can be made, decoding continues without one and reports the error itself.
        return {
            part.sequence.request_id: draft
            for (_, part), draft in zip(wanting, drafts, strict=True)
            if isinstance(draft, Draft)
        }

    def _run_module(self, runner: Runner, parts: Sequence[CommittedTokens], hidden_TD: Tensor) -> Tensor:
        device = hidden_TD.device
        starts, counts = [part.start for part in parts], [part.count for part in parts]
        step = self._cache.step([part.sequence.row for part in parts], starts, counts, device)
        next_ids = [token for part in parts for token in part.sequence.ids[part.start + 1 :][: part.count]]
        rows = [row for part in parts for row in range(part.row, part.row + part.count)]
        next_ids_T = torch.tensor(next_ids, dtype=torch.int64).to(device)
        output = runner.draft(hidden_TD[torch.tensor(rows, device=device)], next_ids_T, step.positions_T, step)
        return output.hidden_BTD[0]
