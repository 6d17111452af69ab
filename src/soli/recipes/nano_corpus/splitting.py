"""Training and held-out text: what is held out, and what of the rest is too near to it to be trained on.

Held out are the everyday sentences, complete Bible books, and one text in `heldout_every` by a hash of the English (so
that all renderings of one text are on one side); nothing of a source that is read in one direction, whose other side
is no reference. A training text is dropped when it equals a held-out one (case, white space and closing punctuation
apart), contains one of its sentences, or shares `GRAM` successive words with it; a Chinese character counts as a word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from soli.data.documents import Pair
from soli.data.text import comparison_key, is_held_out
from soli.recipes.nano_corpus.cleaning import sentences_en, sentences_zh
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.sources.row import SourceRow
from soli.recipes.nano_corpus.sources.source import Source

GRAM = 8
_SHORTEST_LEAK = 16
"""Characters of a compared sentence; shorter ones ("Click OK.") recur everywhere and give nothing away."""
_WORDS = re.compile(r"[a-z']+|[0-9]+|[\u3400-\u9fff\uf900-\ufaff]")


class Line(NamedTuple):
    """A text of one language."""

    language: str
    source: str
    text: str

    @property
    def label(self) -> str:
        """The name of its source in recipes and tables."""
        return f"{self.source} ({self.language})"


class TextIndex:
    """Texts, their sentences and runs of their words, for finding what repeats them."""

    def __init__(self, texts: Iterable[str], runs: bool = True) -> None:
        listed = list(texts)
        self._texts = {comparison_key(text) for text in listed}
        self._sentences = {part for text in listed for part in _sentence_keys(text) if _weight(part) >= _SHORTEST_LEAK}
        self._runs = {run for text in listed for run in word_runs(text)} if runs else set()

    def contains(self, text: str) -> bool:
        """Whether this text is one of them."""
        return comparison_key(text) in self._texts

    def is_repeated_in(self, text: str) -> bool:
        """Whether the text is one of them, or has a sentence of theirs or a run of their words."""
        keys = _sentence_keys(text)
        return not keys.isdisjoint(self._sentences) or any(run in self._runs for run in word_runs(text))


def word_runs(text: str, length: int = GRAM) -> Iterator[tuple[str, ...]]:
    """Every run of `length` successive words, in lower case; a Chinese character is a word."""
    words = _WORDS.findall(text.casefold())
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def split_pairs(
    rows: Iterable[tuple[str, SourceRow]], everyday: Sequence[Pair], config: CorpusConfig
) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of (source, row) in order of preference, each pair once; `everyday` are held out."""
    seen: set[tuple[str, str]] = set()
    renderings: Counter[str] = Counter()
    heldout = list(everyday)
    candidates: list[Pair] = []
    for source, row in rows:
        english = comparison_key(row.en)
        identity = (english, comparison_key(row.zh))
        if identity in seen or renderings[english] >= config.most_renderings:
            continue
        seen.add(identity)
        renderings[english] += 1
        held = row.tag in config.heldout_books or is_held_out(row.en, config.heldout_every)
        held = held and source not in config.directions
        (heldout if held else candidates).append(Pair(source, row.zh, row.en))
    index = TextIndex(both_sides(heldout))
    training = [
        pair
        for pair in candidates
        if not (index.contains(pair.en) or index.contains(pair.zh) or index.is_repeated_in(f"{pair.en}\n{pair.zh}"))
    ]
    return training, heldout


def split_lines(
    texts: dict[Source, list[SourceRow]], training: Iterable[Pair], heldout: Iterable[Pair], config: CorpusConfig
) -> tuple[list[Line], list[Line]]:
    """Training and held-out lines of the sources of one language, up to each source's cap of characters."""
    seen: set[str] = set()
    heldout_index = TextIndex(both_sides(heldout))
    training_index = TextIndex(both_sides(training), runs=False)
    lines: dict[bool, list[Line]] = {False: [], True: []}
    for source, rows in texts.items():
        remaining = config.caps.get(source.label, 1 << 60)
        for text in (row.en or row.zh for row in rows):
            if comparison_key(text) in seen or remaining <= 0 or heldout_index.is_repeated_in(text):
                continue
            seen.add(comparison_key(text))
            remaining -= len(text)
            held = is_held_out(text, config.heldout_every)
            if held and training_index.is_repeated_in(text):
                continue
            lines[held].extend(Line(source.kind, source.name, part) for part in cut(text, config.longest_document))
    return lines[False], lines[True]


def cut(text: str, longest: int) -> list[str]:
    """A text in parts of at most `longest` characters, cut at sentence ends; a longer sentence is not cut."""
    if len(text) <= longest:
        return [text]
    parts = [""]
    for sentence in (part for run in sentences_zh(text) for part in sentences_en(run)):
        if parts[-1] and len(parts[-1]) + len(sentence) >= longest:
            parts.append("")
        glue = " " if parts[-1] and parts[-1][-1].isascii() else ""
        parts[-1] += glue + sentence
    return parts


def both_sides(pairs: Iterable[Pair]) -> Iterator[str]:
    """The English and the Chinese of every pair."""
    return (text for pair in pairs for text in (pair.en, pair.zh))


def _sentence_keys(text: str) -> set[str]:
    """The comparison keys of a text and of each of its sentences."""
    runs = (run for line in text.split("\n") for run in sentences_zh(line))
    return {comparison_key(part) for part in (text, *(sentence for run in runs for sentence in sentences_en(run)))}


def _weight(text: str) -> int:
    """Length in English characters; a Chinese character counts for two."""
    return sum(1 if character.isascii() else 2 for character in text)
