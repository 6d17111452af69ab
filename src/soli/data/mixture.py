"""The mixture: which documents an epoch holds, how often each, and what each looks like as tokens.

A pair is two documents, one for each direction; a line of one language is one. A source's weight w means floor(w)
copies and one more with probability w - floor(w), drawn per document from the recipe's seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from soli.data.fim import split_middle
from soli.data.recipe import DataConfig
from soli.data.tokenizer import Tokenizer
from soli.recipes.nano_corpus.cleaning import is_one_word
from soli.recipes.nano_corpus.corpus import Line, Pair

_BATCH = 20_000
_BATCH_CHARACTERS = 4_000_000  # what is encoded at once stays bounded, however long documents are


class Document(NamedTuple):
    """Segments are (special token, text) in order; `<|bos|>` before and `<|eos|>` after are understood.

    An empty token stands for none: plain text under a vocabulary without `<|text|>`.
    """

    source: str
    segments: tuple[tuple[str, str], ...]
    heldout: bool = False


def pair_documents(pair: Pair) -> tuple[Document, Document]:
    """English to Chinese, and Chinese to English."""
    english, chinese = ("<|en|>", pair.en), ("<|zh|>", pair.zh)
    return Document(pair.source, (english, chinese)), Document(pair.source, (chinese, english))


def text_document(
    source: str, text: str, fim_rate: float, rng: np.random.Generator, plain: str = "<|text|>"
) -> Document:
    """A plain document, begun by the token `plain`; rearranged as prefix, suffix, middle at the given rate."""
    parts = split_middle(text, fim_rate, rng)
    if parts is None:
        return Document(source, ((plain, text),))
    prefix, middle, suffix = parts
    return Document(source, (("<|fim_prefix|>", prefix), ("<|fim_suffix|>", suffix), ("<|fim_middle|>", middle)))


def weight_of(document: Document, config: DataConfig) -> float:
    """Mean copies per epoch: the source's weight, bounded for pairs whose English is a single word."""
    weight = float(config.weights.get(document.source, 1.0))
    english = dict(document.segments).get("<|en|>")
    return weight if english is None or not is_one_word(english) else min(weight, config.one_word_weight)


def mix(pairs: Iterable[Pair], mono: Iterable[Line], config: DataConfig) -> list[Document]:
    """One epoch's documents, weighted and shuffled by the recipe's seed."""
    rng = np.random.default_rng(config.seed)
    drawn: list[Document] = []
    for pair in pairs:
        for document in pair_documents(pair):
            drawn.extend([document] * copies(weight_of(document, config), rng))
    for line in mono:
        document = text_document(line.label, line.text, config.fim_rate, rng)
        drawn.extend([document] * copies(weight_of(document, config), rng))
    return [drawn[i] for i in rng.permutation(len(drawn))]


def heldout_documents(pairs: Iterable[Pair], mono: Iterable[Line]) -> list[Document]:
    """Every held-out pair in both directions and every held-out line, once, in the order given."""
    rng = np.random.default_rng(0)
    documents = [document for pair in pairs for document in pair_documents(pair)]
    return documents + [text_document(line.label, line.text, 0.0, rng) for line in mono]


def copies(weight: float, rng: np.random.Generator) -> int:
    """How often a document of this weight stands in one epoch; one number is drawn."""
    return int(weight) + int(rng.random() < weight % 1)


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """(source, ids) of each document: `<|bos|>`, then each segment's token and text, then `<|eos|>`."""
    return ((document.source, ids) for document, ids in encoded(documents, tokenizer))


def encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its ids; documents are taken as they are needed."""
    for batch in _batches(documents):
        texts = iter(tokenizer.encode_batch([text for document in batch for _, text in document.segments]))
        for document in batch:
            ids = [tokenizer.bos_id]
            for token, _ in document.segments:
                ids += [*([tokenizer.token_id(token)] if token else []), *next(texts)]
            yield document, [*ids, tokenizer.eos_id]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(len(text) for _, text in document.segments)
        if len(batch) == _BATCH or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
