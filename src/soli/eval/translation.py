"""Lines in, translations out, by a model whose tokenizer has <|en|> and <|zh|>.

The lines may be endless: a window is read, translated and handed out before the next is read. Whatever stands before
a line that cannot be translated is translated first; then the line's SoliError is raised.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from soli.data.language import Language, language_of
from soli.engine.batches import generate_many
from soli.engine.generate import Generation
from soli.engine.sampler import GREEDY, SamplingParams
from soli.engine.text_model import TextModel
from soli.errors import SoliError


@dataclass(frozen=True)
class Translation:
    """One line and its translation. An empty line has no direction, no prompt and no generation, and stays empty."""

    source: str
    text: str
    to: Language | None
    prompt: tuple[int, ...] = ()
    generation: Generation | None = None


@dataclass(frozen=True)
class _Asked:
    source: str
    to: Language | None
    prompt: list[int]
    limit: int


@dataclass(frozen=True)
class Translator:
    """How to translate. `to` None: Chinese to English, anything else to Chinese.

    `max_new_tokens` None allows as many as a translation may need, within the model's positions.
    """

    text_model: TextModel
    to: Language | None = None
    sampling: SamplingParams = GREEDY
    max_new_tokens: int | None = None
    trace: bool = False
    batch_size: int = 32

    def translate(
        self, lines: Iterable[str], window: int = 512, on_batch: Callable[[int], None] | None = None
    ) -> Iterator[Translation]:
        """One Translation per line, in order. `on_batch` is told how many lines each finished batch held."""
        for asked in _windows(map(self._asked, range(1, 2**63), lines), window):
            yield from self._answered(asked, on_batch)

    def _asked(self, number: int, line: str) -> _Asked:
        text = _normalised(line)
        if not text:
            return _Asked(line, None, [], 0)
        to = self.to or target_of(text)
        prompt = self.text_model.tokenizer.translation_prompt(text, to)
        return _Asked(line, to, prompt, self._limit(prompt, number))

    def _limit(self, prompt: list[int], number: int) -> int:
        room = self.text_model.room(prompt, f"line {number}")
        if self.max_new_tokens is None:
            return enough(room, prompt)
        if self.max_new_tokens > room:
            raise SoliError(
                f"line {number} has {len(prompt)} tokens and {self.max_new_tokens} more are asked for, but the model "
                f"has {self.text_model.positions} positions: shorten the line or lower max_new_tokens to {room}"
            )
        return self.max_new_tokens

    def _answered(self, asked: list[_Asked], on_batch: Callable[[int], None] | None) -> Iterator[Translation]:
        speaking = [one for one in asked if one.prompt]
        generations = generate_many(
            self.text_model.model,
            [one.prompt for one in speaking],
            max_new_tokens=[one.limit for one in speaking],
            batch_size=self.batch_size,
            sampling=self.sampling,
            stop_ids=self.text_model.stop_ids,
            trace=self.trace,
            on_batch=on_batch,
        )
        for one in asked:
            if not one.prompt:
                yield Translation(one.source, "", None)
                continue
            generation = next(generations)
            text = one_line(self.text_model.tokenizer.decode(generation.ids))
            yield Translation(one.source, text, one.to, tuple(one.prompt), generation)


def translation_request(text_model: TextModel, text: str, to: Language | None) -> tuple[list[int], int]:
    """The prompt for one text, as one line, and as many new tokens as its translation may need. Refuses what is empty
    or too long."""
    line = _normalised(text)
    if not line:
        raise SoliError("the text is empty: give something to translate")
    prompt = text_model.tokenizer.translation_prompt(line, to or target_of(line))
    return prompt, enough(text_model.room(prompt, "the text"), prompt)


def target_of(text: str) -> Language:
    """Chinese goes to English, anything else to Chinese."""
    return "en" if language_of(text) == "zh" else "zh"


def enough(room: int, prompt: Sequence[int]) -> int:
    """How many tokens a translation may take."""
    return min(room, 32 + 3 * len(prompt))


def _normalised(line: str) -> str:
    return " ".join(unicodedata.normalize("NFC", line).split())


def one_line(text: str) -> str:
    """White space as single spaces, control characters gone: a model must not steer the terminal it is printed on."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def _windows(asked: Iterable[_Asked], size: int) -> Iterator[list[_Asked]]:
    window: list[_Asked] = []
    failure: SoliError | None = None
    try:
        for one in asked:
            window.append(one)
            if len(window) == size:
                yield window
                window = []
    except SoliError as error:
        failure = error
    if window:
        yield window
    if failure is not None:
        raise failure
