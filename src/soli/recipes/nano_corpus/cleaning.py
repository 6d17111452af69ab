"""Cleaning rules for one text or one pair: what a line may hold, and how paragraphs are split into sentences.

The rules drop rather than repair: placeholders (%s, {x}, $name), markup, addresses, untranslated strings, and pairs
whose lengths do not match. Only the accelerator marks of menus (_File, 文件(_F)) are removed.
"""

from __future__ import annotations

import html
import re
import unicodedata

from soli.data.text import count_han

_SPACE = re.compile(r"\s+")
_LATIN = re.compile(r"[A-Za-z]")
_WORD = re.compile(r"[A-Za-z]+")
_ACCELERATOR_SUFFIX = re.compile(r"\s*[(（][&_~][A-Za-z0-9][)）]")
_ACCELERATOR = re.compile(r"(?<![A-Za-z0-9])&(?=[A-Za-z0-9])|(?<![A-Za-z0-9]{2})[_~](?=[A-Za-z0-9])")
_FOREIGN = re.compile(
    r"%[-+#0]*[\d.$*]*[a-zA-Z%(]"  # printf
    r"|[{}]|\$[A-Za-z_({]|\$\w+\$|%[A-Z_]+%?|\[%|\\[a-zA-Z\\]"  # templates and escapes
    r"|</?[A-Za-z!]|&[a-z]+;|&#|<\?|\?>"  # markup
    r"|://|www\.|@[\w.]+\.\w|[A-Za-z0-9]_[A-Za-z0-9]+_|\|\|"  # addresses, identifiers
)
_SENTENCE_EN = re.compile(r"(?<=[.!?…])[\"')\]”’]*\s+(?=[\"'(\[“‘]*[A-Z0-9])")
_SENTENCE_ZH = re.compile(r"(?<=[。！？…])(?![。！？…])[”’」』）)]*\s*|(?<=[!?])\s+")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|Mr|Mrs|Ms|Dr|St|No|Fig|approx)\.$")

LONGEST_PAIR = 600
"""Characters of English; a longer pair would not fit a small model's window together with its translation."""


def tidy(text: str) -> str:
    """NFC, entities resolved, control and zero-width characters removed, every run of white space one space."""
    text = unicodedata.normalize("NFC", html.unescape(text)).replace("\u00ad", "").replace("\u200b", "")
    text = "".join(c if c.isprintable() else " " for c in text)
    return _SPACE.sub(" ", text).strip()


def without_accelerators(text: str) -> str:
    """`_Add...` and `添加(_A)...` without the mark of the key that opens them."""
    return _ACCELERATOR.sub("", _ACCELERATOR_SUFFIX.sub("", text))


def is_one_word(english: str) -> bool:
    return " " not in english.strip()


def is_translation(zh: str, en: str, *, dictionary: bool = False) -> bool:
    """Whether a tidied pair may enter the corpus; `dictionary` waives the length ratio (definitions outgrow words)."""
    if not zh or not en or len(en) > LONGEST_PAIR or _FOREIGN.search(zh) or _FOREIGN.search(en):
        return False
    characters, latin = count_han(zh), len(_LATIN.findall(en))
    if not characters or not latin or count_han(en) or latin * 3 < len(en):
        return False
    if len(_WORD.findall(zh)) > characters:
        return False
    return dictionary or _lengths_agree(zh, en)


def _lengths_agree(zh: str, en: str) -> bool:
    """A Chinese character stands for about three English ones; short strings may stray further."""
    return len(en) <= 12 + 6.5 * len(zh) and len(zh) <= 8 + 1.1 * len(en)


def is_prose(text: str, shortest: int) -> bool:
    """Whether a tidied line of one language is running text: long enough, mostly letters, without markup."""
    if len(text) < shortest or _FOREIGN.search(text):
        return False
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters >= 0.8 * len(text)


def sentences_en(text: str) -> list[str]:
    """English sentences; the stop after e.g., Mr. and the like does not end one."""
    parts: list[str] = []
    for part in _split_after(_SENTENCE_EN, text):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] += " " + part
        else:
            parts.append(part)
    return parts


def sentences_zh(text: str) -> list[str]:
    """Chinese sentences, split after 。！？ and the marks that close a quotation."""
    return _split_after(_SENTENCE_ZH, text)


def _split_after(boundary: re.Pattern[str], text: str) -> list[str]:
    """Sentences of `text`, each with the closing marks that the boundary matched after its stop."""
    ends = [match.end() for match in boundary.finditer(text)]
    starts = [0, *ends]
    sentences = [text[start:end].strip() for start, end in zip(starts, [*ends, len(text)], strict=True)]
    return [sentence for sentence in sentences if sentence]


def align(zh: str, en: str) -> list[tuple[str, str]]:
    """Sentence pairs of a paragraph pair where both sides have as many sentences, else the paragraph pair itself."""
    parts_zh, parts_en = sentences_zh(zh), sentences_en(en)
    if len(parts_zh) == len(parts_en) > 1 and all(map(_lengths_agree, parts_zh, parts_en)):
        return list(zip(parts_zh, parts_en, strict=True))
    return [(zh, en)]


class Simplifier:
    """Traditional to simplified characters by OpenCC (`t2s` for classics, `tw2sp` for Taiwan's interface words)."""

    def __init__(self, table: str) -> None:
        import opencc

        self._convert = opencc.OpenCC(table).convert

    def __call__(self, text: str) -> str:
        return str(self._convert(text))
