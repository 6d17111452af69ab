"""Drafts by the model's own MTP module (section 5.4.3): the token after the next, from the hidden state of the last.

The module keeps latents of its own, in the same pages one layer further up. Its entry for a position is made of the
main model's hidden state there and of the token that follows, so it is written when that token is known: after a step
has drawn. For every token that the main model reads, the module reads one too.

Shapes: T tokens of the step, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from soli.engine.latent_cache import FEW, LatentCache
from soli.engine.runner import Runner
from soli.engine.sampler import SamplerState
from soli.engine.scheduler import Task
from soli.engine.speculate import Draft, propose
from soli.model.transformer import Transformer


@dataclass(frozen=True)
class Followed:
    """A part of a step that stays: `count` tokens of the task from position `start`, at `row` of the step's hidden
    states. `state`: of a request that wants a draft of what follows its last token."""

    task: Task
    start: int
    count: int
    row: int
    state: SamplerState | None


class Drafter:
    """Drafts one token ahead with the first MTP module of `model`."""

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self._model, self._cache = model, cache

    def follow(self, runner: Runner, parts: Sequence[Followed], hidden_TD: Tensor) -> dict[int, Draft]:
        """Reads what the main model has read; drafts by the number of their task, for those that want one."""
        if not parts:
            return {}
        parts = sorted(parts, key=lambda part: part.count > FEW)
        device = hidden_TD.device
        starts, counts = [part.start for part in parts], [part.count for part in parts]
        now = self._cache.begin([part.task.row for part in parts], starts, counts, device)
        following = [token for part in parts for token in part.task.ids[part.start + 1 :][: part.count]]
        rows = [row for part in parts for row in range(part.row, part.row + part.count)]
        output = runner.draft(
            hidden_TD[torch.tensor(rows, device=device)],
            torch.tensor(following, dtype=torch.int64).to(device),
            now.positions_T,
            now,
        )
        ends = [end - 1 for end, part in zip(accumulate(counts), parts, strict=True) if part.state is not None]
        wanting = [(part.task.number, part.state) for part in parts if part.state is not None]
        if not wanting:
            return {}
        logits_BV = self._model.head(output.hidden_BTD[0, torch.tensor(ends, device=device)])
        drafts = propose(logits_BV, [state for _, state in wanting])
        # Where no draft can be made, decoding goes on without one and meets what is wrong itself.
        return {number: draft for (number, _), draft in zip(wanting, drafts, strict=True) if isinstance(draft, Draft)}
