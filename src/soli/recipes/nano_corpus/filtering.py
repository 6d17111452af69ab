"""Pairs that are probably no translations of each other, by evidence in the two texts; each is dropped under a rule.

`numbers`: a number on one side that the other has neither in digits nor in words. `latin words`: a word in Latin
letters in the Chinese that the English lacks. `untranslated`: successive English words left in the Chinese, or more
than LATIN_PER_HAN Latin letters for each Chinese character. `language`: another script in the Chinese, or English with
too many accented letters. `length`: a ratio of lengths far from the source's median. Definitions of a dictionary hold
years and explanations that the headword does not: only `latin words` and `untranslated` apply to them.
"""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from soli.data.text import count_han
from soli.recipes.nano_corpus.sources.row import SourceRow

LATIN_PER_HAN = 3.0
ACCENTED_LETTERS = 0.06
"""Share of the English letters, at least three of them; names in an English sentence stay below it."""
LENGTH_DEVIATIONS = 4.0
"""Standard deviations (estimated from the median absolute deviation) of the logarithm of the ratio of lengths."""
_LEAST_DEVIATION = 0.1  # texts after one pattern are all of one ratio
_LEAST_ROWS = 100  # a source of fewer has no reliable median

_NUMBER = re.compile(
    r"(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(\.\d+)?(?:\s?(万亿|[万亿]|thousand|million|billion|trillion))?", re.IGNORECASE
)
_SCALES = {"万": 1e4, "亿": 1e8, "万亿": 1e12, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_CHINESE_NUMERAL = re.compile("[零〇一二两三四五六七八九十百千万亿半双几对单首廿卅]|世纪|年代")
_ENGLISH_NUMERAL = re.compile(
    r"\b(?:zero|nought|non|an?|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen(?:th)?|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)t(?:y|ies|ieth)(?:-\w+)?|hundreds?|thousands?|dozens?|\w+illions?|"
    r"half|halves|quarters?|once|twice|double|triple|single|both|pair|couple|first|second|\w*third|\w*fourth|"
    r"\w*fifth|\w*sixth|\w*seventh|\w*eighth|\w*ninth|tenth|eleventh|twelfth|January|February|March|April|May|June|"
    r"July|August|September|October|November|December|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|noon|midnight|"
    r"o'clock|[ap]\.?m|century|centuries|decades?|fortnight)\b|#'?s\b",
    re.IGNORECASE,
)
_LATIN_WORD = re.compile(r"[A-Za-z]{2,}")
_LATIN_LETTER = re.compile(r"[A-Za-z]")
_NOT_LETTER = re.compile(r"[^a-z]")
_ENGLISH_RUN = re.compile(r"(?<![A-Za-z])[a-z]+(?: [a-z]+){3}(?![A-Za-z])")
_OTHER_SCRIPT = re.compile("[\u0400-\u06ff\u3040-\u30ff\uac00-\ud7a3]")  # Cyrillic to Arabic, kana, Hangul
_UNITS = {
    "km", "cm", "mm", "kg", "mg", "ml", "kb", "mb", "gb", "tb", "hz", "khz", "mhz", "ghz", "ms", "kw", "kwh",
    "id", "ok", "vs", "us", "dj", "tv", "ppt",
}  # fmt: skip


def drop_suspects(rows: Sequence[SourceRow], *, dictionary: bool = False) -> tuple[list[SourceRow], Counter[str]]:
    """The rows of one source that no rule drops, and how many each rule dropped."""
    dropped: Counter[str] = Counter()
    plausible: list[SourceRow] = []
    for row in rows:
        rule = broken_rule(row.zh, row.en, dictionary=dictionary)
        if rule:
            dropped[rule] += 1
        else:
            plausible.append(row)
    if dictionary or len(plausible) < _LEAST_ROWS:
        return plausible, dropped
    is_typical = typical_length_ratio(plausible)
    typical = [row for row in plausible if is_typical(row)]
    if len(typical) < len(plausible):
        dropped["length"] = len(plausible) - len(typical)
    return typical, dropped


def broken_rule(zh: str, en: str, *, dictionary: bool = False) -> str | None:
    """The first rule that a pair breaks by itself, without its source's lengths."""
    if not dictionary and numbers_differ(zh, en):
        return "numbers"
    if _foreign_words(zh, en):
        return "latin words"
    if _ENGLISH_RUN.search(zh) or len(_LATIN_LETTER.findall(zh)) > LATIN_PER_HAN * count_han(zh):
        return "untranslated"
    if not dictionary and (_OTHER_SCRIPT.search(zh) or _is_other_language(en)):
        return "language"
    return None


def numbers_differ(zh: str, en: str) -> bool:
    """Whether a side has a number in digits that the other has not, and no numeral in words that could stand for it."""
    chinese, zh_words = _split_numbers(zh)
    english, en_words = _split_numbers(en)
    unmatched_chinese = bool(chinese - english) and not _ENGLISH_NUMERAL.search(en_words)
    unmatched_english = bool(english - chinese) and not _CHINESE_NUMERAL.search(zh_words)
    return unmatched_chinese or unmatched_english


def _split_numbers(text: str) -> tuple[set[float], str]:
    """Numbers in digits, with the word of scale that follows (16亿 and 1.6 billion are equal), and the other text."""
    text = unicodedata.normalize("NFKC", text)
    values = set()
    for whole, fraction, scale in _NUMBER.findall(text):
        value = float(whole.replace(",", "") + fraction) * _SCALES.get(scale.lower(), 1.0)
        values.add(round(value, 6))
    return values, _NUMBER.sub("#", text)


def _foreign_words(zh: str, en: str) -> list[str]:
    """Latin words of the Chinese that are not in the English, spaces and punctuation apart; units of measure may."""
    english = _NOT_LETTER.sub("", en.casefold())
    words = (word.casefold() for word in _LATIN_WORD.findall(zh))
    return [word for word in words if word not in english and word not in _UNITS]


def _is_other_language(en: str) -> bool:
    """Whether a text is Polish, Vietnamese or the like, by its accented letters."""
    letters = [character for character in en if character.isalpha()]
    accented = sum(not letter.isascii() for letter in letters)
    return accented >= 3 and accented > ACCENTED_LETTERS * len(letters)


def typical_length_ratio(rows: Iterable[SourceRow]) -> Callable[[SourceRow], bool]:
    """Whether a row's ratio of lengths is within LENGTH_DEVIATIONS of the rows' median."""
    ratios = [_log_ratio(row) for row in rows]
    median = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(ratio - median) for ratio in ratios)
    limit = LENGTH_DEVIATIONS * max(deviation, _LEAST_DEVIATION)
    return lambda row: abs(_log_ratio(row) - median) <= limit


def _log_ratio(row: SourceRow) -> float:
    """ln of English characters over Chinese ones; the constants bound the ratios of single words."""
    return math.log((len(row.en) + 10) / (len(row.zh) + 4))
