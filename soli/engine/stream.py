"""Tokens to text as they come: never half a character, never part of a stop string.

A byte-level token may end inside a UTF-8 sequence. Lossy decoding shows an unfinished sequence as exactly one U+FFFD
at the very end, so that one character is held back until the bytes that complete it (or prove it broken) arrive.
"""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"


class TextStream:
    """Turns the tokens of one generation into pieces of text whose concatenation is the final text.

    `decode` maps all tokens so far to text. Once a stop string appears, `stopped` is true and the text ends before it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._text = ""
        self._given = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything decoded so far, held-back characters included, cut before a stop string."""
        return self._text

    def push(self, token: int) -> str:
        """The characters that this token settles; often none, for a token that ends inside a character."""
        if self.stopped:
            return ""
        self._ids.append(token)
        self._text = self._decode(self._ids)
        cut = first_stop(self._text, self._stops)
        if cut is not None:
            self.stopped, self._text = True, self._text[:cut]
            return self._give(len(self._text))
        settled = len(self._text) - self._text.endswith(UNFINISHED)
        return self._give(settled - self._possible_stop(self._text[:settled]))

    def finish(self) -> str:
        """What was held back: called once, after the last token."""
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _possible_stop(self, text: str) -> int:
        """How many characters at the end of `text` could still grow into a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins in `text`, or None."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found, default=None)
