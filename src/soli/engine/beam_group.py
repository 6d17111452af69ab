"""The beams of one request in the engine: sequences that are computed one by one and continue together.

Each beam is a sequence of the scheduler with blocks of its own, of which it shares the full ones with others of the
request. The first computes the prompt; after its first step there are `beam_width`. A beam that is computed waits, with
nothing remaining, until the others of its request are too.
"""

from collections.abc import Sequence
from typing import Literal

from soli.data.tokenizer import Tokenizer
from soli.engine.beam_search import BeamSearch, Continuation, Hypothesis
from soli.engine.detokenizer import TextStream, token_text
from soli.engine.sampler import NOT_FINITE
from soli.engine.scheduler import SequenceState
from soli.errors import SoliError
from soli.model.router import Routing, join_routing


class BeamGroup:
    """`beams`: the sequences of the request, the likeliest first; `first`, of the prompt, is one of them."""

    def __init__(self, first: SequenceState, tokenizer: Tokenizer) -> None:
        request = first.request
        assert request.beam_search is not None
        self.beams = [first]
        self._prompt_tokens = len(request.prompt_ids)
        self._tokenizer, self._visible_ids = tokenizer, request.visible_ids
        self._search = BeamSearch(request.beam_search, request.stop_ids, request.max_new_tokens, self._finish)
        self._computed: dict[SequenceState, list[tuple[float, int]] | None] = {}

    @property
    def considered(self) -> int:
        """How many continuations of each beam `receive` needs."""
        return self._search.considered

    @property
    def is_complete(self) -> bool:
        """Whether the continuations of all beams are there."""
        return len(self._computed) == len(self.beams)

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """The finished texts, the best first."""
        return self._search.hypotheses

    def receive(self, beam: SequenceState, continuations: list[tuple[float, int]] | None) -> None:
        """A beam's log-probabilities with each next token; None where its logits are not finite."""
        self._computed[beam] = continuations

    def advance(self) -> list[Continuation]:
        """The beams of the next step; none where the search has ended. SoliError for logits that are not finite."""
        continuations: list[Continuation] = []
        for place, beam in enumerate(self.beams):
            computed = self._computed[beam]
            if computed is None:
                raise SoliError(NOT_FINITE)
            continuations += [Continuation(total, place, token) for total, token in computed]
        self._computed.clear()
        return self._search.advance(continuations)

    def _finish(self, last: Continuation, score: float, finish_reason: Literal["stop", "length"]) -> Hypothesis:
        beam = self.beams[last.beam]
        ids = tuple(beam.ids[self._prompt_tokens :])
        if finish_reason == "length":
            ids += (last.token,)
        return Hypothesis(ids, self._text(ids), last.log_probability, score, finish_reason, _joined(beam.routing))

    def _text(self, ids: Sequence[int]) -> str:
        stream = TextStream(token_text(self._tokenizer, self._visible_ids))
        return "".join(map(stream.push, ids)) + stream.finish()


def _joined(routing: Sequence[tuple[Routing, ...]]) -> tuple[Routing, ...] | None:
    return tuple(map(join_routing, zip(*routing, strict=True))) if routing else None
