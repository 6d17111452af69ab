"""Tokens to text as they come: never half a character, never part of a stop string, at a constant cost per token.

A byte-level token may end inside a UTF-8 sequence: its bytes wait in an incremental decoder until the character is
whole, or proven broken and shown as U+FFFD. Stop strings are followed a character at a time with the Knuth-Morris-Pratt
automaton, so the text is the same however the tokens cut it; what may still grow into a stop string waits too.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from soli.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"


class TokenText(Protocol):
    """Turns tokens into characters that are settled."""

    def push(self, token: int) -> str:
        """The characters that this token completes; often none."""

    def finish(self) -> str:
        """What was left unfinished."""


class ByteText:
    """For byte-level tokenizers: UTF-8 read from the bytes of token after token."""

    def __init__(self, text_bytes: Callable[[int], bytes]) -> None:
        self._bytes = text_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._bytes(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowText:
    """For every other tokenizer: decodes the tokens since the last settled text, with the ones before as context.

    Lossy decoding shows an unfinished character as U+FFFD at the very end. At most WAIT tokens wait for its rest.
    """

    WAIT = 8

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        self._waiting.append(token)
        piece = self._piece()
        if piece.endswith(UNFINISHED) and len(self._waiting) < self.WAIT:
            return ""
        if piece:  # an empty one (a special token) stays with what comes next, to keep real context before it
            self._context, self._waiting = self._waiting, []
        return piece

    def finish(self) -> str:
        return self._piece()

    def _piece(self) -> str:
        return self._decode(self._context + self._waiting)[len(self._decode(self._context)) :]


def token_text(tokenizer: Tokenizer) -> TokenText:
    """The way to read this tokenizer's tokens one at a time."""
    return ByteText(tokenizer.text_bytes) if tokenizer.byte_level else WindowText(tokenizer.decode)


class TextStream:
    """Turns the tokens of one generation into pieces of text whose concatenation is the final text.

    Once a stop string is complete, `stopped` is true and the text ends before it (before the longest of several that
    end at the same character).
    """

    def __init__(self, tokens: TokenText, stops: Sequence[str] = ()) -> None:
        self._tokens = tokens
        self._stops = [_Stop(stop) for stop in stops if stop]
        self._given: list[str] = []
        self._held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything settled so far, held back or not, cut before a stop string."""
        return "".join(self._given) + self._held

    def push(self, token: int) -> str:
        """The characters that this token settles; often none, for a token that ends inside a character."""
        return "" if self.stopped else self._give(self._tokens.push(token))

    def finish(self) -> str:
        """What was held back: called once, after the last token."""
        if self.stopped:
            return ""
        piece = self._give(self._tokens.finish())
        rest, self._held = self._held, ""
        self._given.append(rest)
        return piece + rest

    def _give(self, new: str) -> str:
        """Moves what cannot become a stop string any more from `_held` and `new` to the text given out."""
        if self._stops:
            new, held = self._scan(self._held + new, len(self._held))
        else:
            held = ""
        self._held = held
        self._given.append(new)
        return new

    def _scan(self, text: str, start: int) -> tuple[str, str]:
        """`text` in two: what is settled, and what is held back; characters before `start` were scanned before."""
        for at in range(start, len(text)):
            complete = max(stop.push(text[at]) for stop in self._stops)
            if complete:
                self.stopped = True
                return text[: at + 1 - complete], ""
        settled = len(text) - max(stop.matched for stop in self._stops)
        return text[:settled], text[settled:]


class _Stop:
    """How many characters at the end of the text are the beginning of one stop string (Knuth, Morris, Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._shorter = [0]  # by characters matched, less 1: the longest shorter beginning that is also their end
        self.matched = 0
        for character in stop[1:]:
            self._shorter.append(self._step(self._shorter[-1], character))

    def push(self, character: str) -> int:
        """Takes the text's next character; the stop string's length if this completes it, else 0."""
        self.matched = self._step(self.matched, character)
        return self.matched if self.matched == len(self._stop) else 0

    def _step(self, matched: int, character: str) -> int:
        while matched and self._stop[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self._stop[matched] == character)
