"""BPE-dropout: some tokens of a training text are split again, so that what is read often is not learned by heart.

Provilkov et al. 2020 (arXiv 1910.13267) leave out each merge of the byte-pair encoding with some probability.

# differs: here a finished token is split into the two that it was merged from with that probability, and those again;
# a character is not split into bytes. It needs nothing of the encoder, and the same seed gives the same tokens.
"""

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from soli.data.tokenizer import Tokenizer


class BpeDropout:
    """Splits tokens of `tokenizer` with the probability `rate`, drawn from `seed`, one call after another."""

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int) -> None:
        self.rate = rate
        self.rng = np.random.default_rng([seed, 1])  # apart from what the seed draws elsewhere
        self.parts_V2 = merged_from(tokenizer)

    def __call__(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids of each text, some of them split."""
        if not self.rate:
            return [list(ids) for ids in texts]
        lengths = np.array([len(ids) for ids in texts])
        ids_T = np.fromiter((token for ids in texts for token in ids), np.int64, int(lengths.sum()))
        text_T = np.repeat(np.arange(len(texts)), lengths)
        may_split_T = np.ones(len(ids_T), dtype=bool)
        while may_split_T.any():  # then the parts of what was split
            may_split_T &= self.parts_V2[ids_T, 0] >= 0
            split_T = may_split_T & (self.rng.random(len(ids_T)) < self.rate)
            first_T = np.arange(len(ids_T)) + np.cumsum(split_T) - split_T  # where each token is after the splits
            parts_S2 = self.parts_V2[ids_T[split_T]]
            ids_T, text_T = np.repeat(ids_T, 1 + split_T), np.repeat(text_T, 1 + split_T)
            may_split_T = np.zeros(len(ids_T), dtype=bool)
            for side in (0, 1):
                ids_T[first_T[split_T] + side] = parts_S2[:, side]
                may_split_T[first_T[split_T] + side] = True
        ends = np.cumsum(np.bincount(text_T, minlength=len(texts)))
        return [part.tolist() for part in np.split(ids_T, ends[:-1])]


def merged_from(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The two tokens that each token of the vocabulary was merged from (V, 2); -1 where it was not, or where one of
    them is a part of a character."""
    vocabulary = tokenizer.vocabulary()
    parts_V2 = np.full((tokenizer.vocab_size, 2), -1)
    for left, right in reversed(json.loads(tokenizer.to_json())["model"]["merges"]):  # the first of several counts
        pair = [vocabulary[left], vocabulary[right]]
        if all(_is_text(tokenizer.token_bytes(part)) for part in pair):
            parts_V2[vocabulary[left + right]] = pair
    return parts_V2


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
