"""The prompt at the head of its completion (`echo`), with its tokens' places in the text and log-probabilities.

Nothing is before the first token, so it has no log-probability. The token that ends the text is listed behind it: what
reads the logprobs of a prompt asks for one token more and leaves out the last entry, whatever it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from soli.data.tokenizer import Tokenizer
from soli.engine.detokenizer import TextStream, token_text
from soli.engine.request import Event
from soli.engine.sampler import TokenLogprob


class ListedToken(NamedTuple):
    """A token in the logprobs of a completion. `offset`: in the text. `logprob` None: nothing is before it."""

    token: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class PromptText:
    """A prompt as text, with its tokens and their offsets in it."""

    text: str
    token_ids: Sequence[int]
    offsets: Sequence[int]

    @classmethod
    def of(cls, token_ids: Sequence[int], tokenizer: Tokenizer, text: str | None = None) -> "PromptText":
        """`text` is what was sent, if it was a text: tokens that were put around it have no place of their own. Without
        it special tokens are no part of the text."""
        stream = TextStream(token_text(tokenizer, () if text is None else tokenizer.special_ids))
        pieces, offsets, length = [], [], 0
        for token in token_ids:
            offsets.append(length)
            piece = stream.push(token)
            if text is None or text.startswith(piece, length):
                pieces.append(piece)
                length += len(piece)
        return cls("".join(pieces) + stream.finish() if text is None else text, token_ids, offsets)


@dataclass
class PromptEcho:
    """Emits a prompt once, whole: with `with_logprobs` as soon as those of all its tokens are known."""

    prompt: PromptText
    with_logprobs: bool
    _logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    _emitted: bool = False

    def push(self, event: Event) -> tuple[str, list[ListedToken]]:
        """The prompt's text and tokens if this event completes them, else nothing."""
        self._logprobs += event.prompt_logprobs
        is_complete = not self.with_logprobs or len(self._logprobs) == len(self.prompt.token_ids)
        if self._emitted or not is_complete:
            return "", []
        self._emitted = True
        tokens = zip(self.prompt.token_ids, self.prompt.offsets, self._logprobs, strict=self.with_logprobs)
        return self.prompt.text, [ListedToken(*token) for token in tokens] if self.with_logprobs else []
