"""Documents: texts and translation pairs as the segments that training sees, and their encoding into tokens.

A translation pair is two documents, one for each direction; a plain text is one. A source's weight w means floor(w)
copies in an epoch and one more with probability w - floor(w).

Fill-in-the-middle: a share of plain documents is rearranged as prefix, suffix, middle (PSM, section 4.1 of the
DeepSeek-V3 report, arXiv 2412.19437), so that a model learns to write between prefix and suffix. Cut at characters, not
tokens, so that at inference the gap may fall inside a word. Texts shorter than three characters stay as they are.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from soli.data.tokenizer import Tokenizer

_BATCH_DOCUMENTS = 20_000
_BATCH_CHARACTERS = 4_000_000  # bounds what is encoded at once, however long documents are

# Called with the name of a source or step and its state: `fetching`, `12,345 rows`, `skipped: reason`.
ReportStep = Callable[[str, str], None]


class Pair(NamedTuple):
    """A text in Chinese and English."""

    source: str
    zh: str
    en: str


class Document(NamedTuple):
    """Segments are (special token, text) in order; `<|bos|>` before and `<|eos|>` after are implied.

    An empty special token means none: plain text under a vocabulary without `<|text|>`.
    """

    source: str
    segments: tuple[tuple[str, str], ...]
    heldout: bool = False


def pair_documents(pair: Pair) -> tuple[Document, Document]:
    """English to Chinese, and Chinese to English."""
    english = ("<|en|>", pair.en)
    chinese = ("<|zh|>", pair.zh)
    return Document(pair.source, (english, chinese)), Document(pair.source, (chinese, english))


def text_document(
    source: str, text: str, fim_rate: float, rng: np.random.Generator, text_token: str = "<|text|>"
) -> Document:
    """A plain document that starts with `text_token`; rearranged as prefix, suffix, middle at the given rate."""
    parts = split_middle(text, fim_rate, rng)
    if parts is None:
        return Document(source, ((text_token, text),))
    prefix, middle, suffix = parts
    return Document(source, (("<|fim_prefix|>", prefix), ("<|fim_suffix|>", suffix), ("<|fim_middle|>", middle)))


def split_middle(text: str, rate: float, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) with probability `rate`, else None; joined they are the text, the middle not empty."""
    if len(text) < 3 or rng.random() >= rate:
        return None
    start, end = sorted(int(i) for i in rng.choice(len(text) + 1, size=2, replace=False))
    return text[:start], text[start:end], text[end:]


def draw_copies(weight: float, rng: np.random.Generator) -> int:
    """How often a document of this weight occurs in one epoch; draws one number."""
    return int(weight) + int(rng.random() < weight % 1)


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its ids: `<|bos|>`, each segment's special token and text, `<|eos|>`. Lazy over documents."""
    for batch in _batches(documents):
        texts = iter(tokenizer.encode_batch([text for document in batch for _, text in document.segments]))
        for document in batch:
            ids = [tokenizer.bos_id]
            for token, _ in document.segments:
                if token:
                    ids.append(tokenizer.token_id(token))
                ids += next(texts)
            yield document, [*ids, tokenizer.eos_id]


def encode_by_source(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """(source, ids) of each document, as `write_tokens` takes them."""
    return ((document.source, ids) for document, ids in encode_documents(documents, tokenizer))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(len(text) for _, text in document.segments)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
