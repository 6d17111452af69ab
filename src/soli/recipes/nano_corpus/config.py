"""The [data] section of a recipe whose corpus is nano_corpus: what goes into the corpus, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from soli.data.recipe import DataConfig
from soli.sections import Bounds, NonNegativeInt, PositiveInt

Weight = Annotated[float, Bounds(at_least=0, at_most=100)]
Direction = Literal["en-zh", "zh-en"]


@dataclass(frozen=True)
class CorpusConfig(DataConfig, section="data"):
    """Fields of every [data] section, and those of this corpus. Checked at construction."""

    vocab_size: Annotated[int, Bounds(at_least=272, at_most=65536)] = 6144  # tokens are stored in 16 bits
    heldout_books: tuple[str, ...] = ()  # short names of Bible books held out completely
    most_renderings: PositiveInt = 3  # Chinese renderings kept of one English text
    one_word_weight: Weight = 1.0  # an upper bound on the weight of pairs whose English is one word
    tokenizer: str | None = None  # a model folder or nano, whose vocabulary the data get; None: one is learnt
    tokenizer_characters: PositiveInt = 20_000_000  # how much text the vocabulary is learnt from
    weights: dict[str, Weight] = field(default_factory=dict)  # copies per epoch of a source's documents; 1 if unnamed
    directions: dict[str, Direction] = field(default_factory=dict)  # the one way a source is read; both if unnamed
    caps: dict[str, NonNegativeInt] = field(default_factory=dict)  # characters at most of a source of one language
