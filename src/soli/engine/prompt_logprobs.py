"""Log-probabilities of a prompt's tokens, each given those before it, from the hidden states of its prefill.

The head is applied to few tokens at a time, apart from the logits that tokens are sampled from: memory is bounded for
any vocabulary, and the bits of the other requests in the step stay as they are.

Shapes: T tokens of a step, N of them scored, D hidden, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from soli.engine.sampler import NOT_FINITE, TokenLogprob, token_logprob
from soli.engine.scheduler import ScheduledTokens
from soli.errors import SoliError
from soli.model.transformer import Transformer

TOKENS_AT_ONCE = 64


def prompt_logprobs(model: Transformer, part: ScheduledTokens, hidden_TD: Tensor) -> tuple[TokenLogprob, ...]:
    """Of the prompt tokens that follow tokens of this part, in their order, without those that an event had before a
    preemption; recorded in the sequence's `scored`. SoliError for logits that are not finite."""
    sequence, request = part.sequence, part.sequence.request
    first = max(sequence.scored, part.start)
    end = min(part.start + part.count, len(request.prompt_ids) - 1)
    if request.prompt_logprobs is None or first >= end:
        return ()
    sequence.scored = end
    scores: list[TokenLogprob] = []
    for start in range(first, end, TOKENS_AT_ONCE):
        positions = range(start, min(start + TOKENS_AT_ONCE, end))
        row = part.row - part.start  # of position 0
        indices = torch.tensor([row + position for position in positions], device=hidden_TD.device)
        logits_NV = model.head(hidden_TD[indices]).float().cpu().numpy()
        if not np.isfinite(logits_NV).all():
            raise SoliError(NOT_FINITE)
        scores += [
            token_logprob(logits_V, request.prompt_ids[position + 1], request.prompt_logprobs)
            for position, logits_V in zip(positions, logits_NV, strict=True)
        ]
    return tuple(scores)
