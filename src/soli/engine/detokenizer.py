"""Incremental detokenization: whole characters only, no part of a stop string, at a constant cost per token.

A byte-level token may end inside a UTF-8 sequence: an incremental decoder holds its bytes until the character is
complete, or invalid and shown as U+FFFD. Stop strings are matched a character at a time with the Knuth-Morris-Pratt
automaton, so that the text does not depend on how the tokens split it; a possible beginning of a stop string is held
back too.
"""

import codecs
from collections.abc import Callable, Collection, Sequence

from soli.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class ByteText:
    """For byte-level tokenizers: UTF-8 decoded from the bytes of token after token."""

    def __init__(self, text_bytes: Callable[[int], bytes]) -> None:
        self._bytes = text_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes; often none."""
        return self._utf8.decode(self._bytes(token))

    def finish(self) -> str:
        """The rest, its incomplete characters shown as U+FFFD."""
        return self._utf8.decode(b"", final=True)


class WindowText:
    """For every other tokenizer: decodes the tokens since the last complete text, with the ones before as context.

    Lossy decoding shows an incomplete character as U+FFFD at the very end. At most MAX_PENDING tokens are held for it.
    """

    MAX_PENDING = 8

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        self._pending.append(token)
        piece = self._piece()
        if piece.endswith(REPLACEMENT) and len(self._pending) < self.MAX_PENDING:
            return ""
        if piece:  # a token without text (a special one) stays pending, so that the context has text
            self._context, self._pending = self._pending, []
        return piece

    def finish(self) -> str:
        return self._piece()

    def _piece(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]


TokenText = ByteText | WindowText  # turns tokens into complete characters


def token_text(tokenizer: Tokenizer, visible: Collection[int] = ()) -> TokenText:
    """The incremental decoder of this tokenizer; of special tokens it shows those that are `visible`."""
    if tokenizer.byte_level:
        return ByteText(lambda token: tokenizer.text_bytes(token, visible))
    return WindowText(lambda tokens: tokenizer.decode(tokens, visible))


class TextStream:
    """Turns the tokens of one generation into pieces of text whose concatenation is the final text.

    Once a stop string is complete, `stop_string` is that string and the text ends before it (before the longest of
    several that end at the same character).
    """

    def __init__(self, tokens: TokenText, stops: Sequence[str] = ()) -> None:
        self._tokens = tokens
        self._stops = [_StopString(stop) for stop in stops if stop]
        self._held = ""
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop_string is not None

    def push(self, token: int) -> str:
        """The characters that this token completes; often none, for a token that ends inside a character."""
        return "" if self.stopped else self._emit(self._tokens.push(token))

    def finish(self) -> str:
        """The text that was held back: called once, after the last token."""
        return "" if self.stopped else self._emit(self._tokens.finish()) + self._held

    def _emit(self, new: str) -> str:
        """Returns the part of `_held` and `new` that cannot become a stop string, and holds the rest."""
        if not self._stops:
            return new
        scanned = len(self._held)
        text = self._held + new
        for index in range(scanned, len(text)):
            longest = max(stop.push(text[index]) for stop in self._stops)
            if longest:
                self.stop_string = text[index + 1 - longest : index + 1]
                self._held = ""
                return text[: index + 1 - longest]
        end = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[end:]
        return text[:end]


class _StopString:
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
