"""How well a model translates and predicts: chrF and BLEU on held-out pairs, bits per byte on text, MTP acceptance,
load.

chrF and BLEU are sacrebleu's, corpus-wide and per source, BLEU on its `zh` and `13a` tokens; translations are greedy.
Bits per byte scores every token of a text and its end, given the text's beginning-of-document tokens, over its UTF-8
bytes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from soli.data.language import Language, language_of
from soli.engine.text_model import TextModel
from soli.eval.routing_statistics import LayerLoad, layer_loads
from soli.eval.scoring import Reading, read_sequences
from soli.eval.translation import Translator

Pair = tuple[str, str, str]  # source, zh, en
BLEU_TOKENS = {"zh": "zh", "en": "13a"}
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Quality:
    """sacrebleu's chrF2 and BLEU, 0 to 100, over `count` sentences, and the signature to compare them by."""

    chrf: float
    bleu: float
    count: int
    signature: str


@dataclass(frozen=True)
class Direction:
    """One direction of translation: overall, by source, and a few examples (text, translation, reference)."""

    overall: Quality
    by_source: dict[str, Quality]
    examples: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Forced:
    """What reading true texts showed. `mtp_acceptance` None: the model has no MTP module."""

    tokens: int
    mtp_acceptance: float | None
    load: list[LayerLoad]
    bits_per_byte: dict[str, float] = field(default_factory=dict)  # by language, and "all"


def evaluate_direction(
    text_model: TextModel, pairs: Sequence[Pair], to: Language, batch_size: int = 32, on_answer: Progress | None = None
) -> Direction:
    """Translates one side of every pair, greedily, and scores it against the other."""
    translator = Translator(text_model, to=to, batch_size=batch_size)
    source, target = (2, 1) if to == "zh" else (1, 2)
    texts, references = [pair[source] for pair in pairs], [pair[target] for pair in pairs]
    given = [done.text for done in translator.translate(texts, window=len(texts), on_answer=on_answer)]
    by_source = {}
    for name in sorted({pair[0] for pair in pairs}):
        rows = [row for row, pair in enumerate(pairs) if pair[0] == name]
        by_source[name] = quality([given[row] for row in rows], [references[row] for row in rows], to)
    examples = list(zip(texts, given, references, strict=True))[:: max(1, len(pairs) // 8)]
    return Direction(quality(given, references, to), by_source, examples)


def quality(given: Sequence[str], references: Sequence[str], to: Language) -> Quality:
    """Corpus chrF and BLEU of translations into `to`."""
    from sacrebleu.metrics import BLEU, CHRF

    chrf, bleu = CHRF(), BLEU(tokenize=BLEU_TOKENS[to])
    chrf_score, bleu_score = (float(metric.corpus_score(given, [references]).score) for metric in (chrf, bleu))
    return Quality(chrf_score, bleu_score, len(given), f"chrF {chrf.get_signature()}, BLEU {bleu.get_signature()}")


def read_pairs(text_model: TextModel, pairs: Sequence[Pair], on_text: Progress | None = None) -> Forced:
    """Reads every pair as a training document, both ways round: load and MTP acceptance where the model is at home."""
    tokenizer = text_model.tokenizer
    documents = []
    for _, zh, en in pairs:
        for text, translation, to in ((en, zh, "zh"), (zh, en, "en")):
            ids = [*tokenizer.translation_prompt(text, to), *tokenizer.encode(translation), *ending(text_model)]
            documents.append(ids[: text_model.positions])
    readings = _watched(read_sequences(text_model.model, documents, skip=2), on_text)
    return _forced(text_model, readings)


def read_texts(text_model: TextModel, texts: Sequence[str], on_text: Progress | None = None) -> Forced:
    """Reads plain texts: bits per byte as well. A text longer than the model's positions is read in parts."""
    documents, owners = [], []
    for number, text in enumerate(texts):
        for part in document_parts(text_model, text, end=True):
            documents.append(part)
            owners.append(number)
    skip = len(text_model.text_prefix) or 1
    readings = list(_watched(read_sequences(text_model.model, documents, skip=skip), on_text))
    bits = np.zeros(len(texts))
    for reading in readings:
        bits[owners[reading.number]] += reading.bits
    return _forced(text_model, readings, _bits_per_byte(texts, bits.tolist()))


def document_parts(text_model: TextModel, text: str, end: bool) -> list[list[int]]:
    """A text as the model reads one: its first tokens, the text, perhaps its end; several such when it is too long."""
    body = [*text_model.tokenizer.encode(text), *(ending(text_model) if end else [])]
    prefix = list(text_model.text_prefix)
    room = text_model.positions - len(prefix)
    return [[*prefix, *body[start : start + room]] for start in range(0, len(body), room)]


def ending(text_model: TextModel) -> list[int]:
    """The token that ends a document, if the model has one."""
    return sorted(text_model.stop_ids)[:1]


def _bits_per_byte(texts: Sequence[str], bits: Sequence[float]) -> dict[str, float]:
    found = {}
    languages = [language_of(text) for text in texts]
    for name in ("en", "zh", "all"):
        rows = [row for row, language in enumerate(languages) if name in (language, "all")]
        size = sum(len(texts[row].encode()) for row in rows)
        if size:
            found[name] = sum(bits[row] for row in rows) / size
    return found


def _forced(
    text_model: TextModel, readings: Iterable[Reading], bits_per_byte: dict[str, float] | None = None
) -> Forced:
    tokens = tried = agreed = 0
    counts_LE: np.ndarray | int = 0
    for reading in readings:
        tokens, tried, agreed = tokens + reading.tokens, tried + reading.mtp_tried, agreed + reading.mtp_agreed
        counts_LE = counts_LE + reading.counts_LE
    names = [name for name, _ in text_model.model.moe_layers() if name.startswith("layers.")]
    load = layer_loads(names, np.asarray(counts_LE)) if names else []
    return Forced(tokens, agreed / tried if tried else None, load, bits_per_byte or {})


def _watched(readings: Iterator[Reading], on_text: Progress | None) -> Iterator[Reading]:
    for reading in readings:
        if on_text is not None:
            on_text(1)
        yield reading
