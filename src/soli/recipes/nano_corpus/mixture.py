"""The mixture: which documents one epoch of the corpus holds, and how often each, drawn from the recipe's seed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from soli.data.documents import Document, Pair, draw_copies, pair_documents, text_document
from soli.recipes.nano_corpus.cleaning import is_one_word
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.corpus import Line


def weight_of(document: Document, config: CorpusConfig) -> float:
    """Mean copies per epoch: the source's weight, bounded for pairs whose English is a single word."""
    weight = float(config.weights.get(document.source, 1.0))
    english = dict(document.segments).get("<|en|>")
    if english is None or not is_one_word(english):
        return weight
    return min(weight, config.one_word_weight)


def training_documents(pair: Pair, config: CorpusConfig) -> tuple[Document, ...]:
    """The pair's documents in the directions that its source is read in."""
    to_chinese, to_english = pair_documents(pair)
    match config.directions.get(pair.source):
        case "en-zh":
            return (to_chinese,)
        case "zh-en":
            return (to_english,)
    return to_chinese, to_english


def mix(pairs: Iterable[Pair], mono: Iterable[Line], config: CorpusConfig) -> list[Document]:
    """One epoch's documents, weighted and shuffled by the recipe's seed."""
    rng = np.random.default_rng(config.seed)
    documents: list[Document] = []
    for pair in pairs:
        for document in training_documents(pair, config):
            documents.extend([document] * draw_copies(weight_of(document, config), rng))
    for line in mono:
        document = text_document(line.label, line.text, config.fim_rate, rng)
        documents.extend([document] * draw_copies(weight_of(document, config), rng))
    return [documents[i] for i in rng.permutation(len(documents))]


def heldout_documents(pairs: Iterable[Pair], mono: Iterable[Line]) -> list[Document]:
    """Every held-out pair in both directions and every held-out line, once, in the order given."""
    rng = np.random.default_rng(0)
    documents = [document for pair in pairs for document in pair_documents(pair)]
    return documents + [text_document(line.label, line.text, 0.0, rng) for line in mono]
