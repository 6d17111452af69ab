"""Runs a model over a list of texts and reports its experts' load and language preference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from soli.data.language import language_of
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.eval.quality import document_parts
from soli.eval.routing_statistics import ExpertPreference, LayerLoad, language_preference, layer_loads
from soli.eval.scoring import read_sequences


@dataclass(frozen=True)
class LanguageCount:
    """How much of the texts is in one language ("neither": numbers and signs alone)."""

    texts: int
    tokens: int


@dataclass(frozen=True)
class RoutingReport:
    """Load per layer, preference per expert (empty when there are too few texts of a language), and how they were
    found.

    A text, and with it each of its tokens, counts for the language of its script. Special tokens are not counted.
    """

    languages: dict[str, LanguageCount]
    loads: list[LayerLoad]
    preferences: list[ExpertPreference]
    permutations: int
    seed: int


def report_routing(
    text_model: TextModel,
    texts: Sequence[str],
    *,
    permutations: int = 2000,
    seed: int = 0,
    on_part: Callable[[int], None] | None = None,
) -> RoutingReport:
    """Reads every text once, in parts where it is longer than the model. Refuses a model without routed experts."""
    names = [name for name, _ in text_model.model.moe_layers() if name.startswith("layers.")]
    if not names:
        raise SoliError("this model has no routed experts: every parameter plays for every token, there is no routing")
    parts = [
        (number, part) for number, text in enumerate(texts) for part in document_parts(text_model, text, end=False)
    ]
    experts = text_model.model.config.n_routed_experts
    counts_NLE = np.zeros((len(texts), len(names), experts), dtype=np.int64)
    tokens_N = np.zeros(len(texts), dtype=np.int64)
    skip = len(text_model.text_prefix)
    for reading in read_sequences(text_model.model, [part for _, part in parts], skip=skip, score=False):
        number = parts[reading.number][0]
        counts_NLE[number] += reading.counts_LE
        tokens_N[number] += reading.tokens
        if on_part is not None:
            on_part(1)
    languages = [language_of(text) for text in texts]
    return RoutingReport(
        languages=_language_counts(languages, tokens_N),
        loads=layer_loads(names, counts_NLE.sum(axis=0)),
        preferences=language_preference(names, counts_NLE, tokens_N, languages, permutations=permutations, seed=seed),
        permutations=permutations,
        seed=seed,
    )


def _language_counts(languages: Sequence[str | None], tokens_N: np.ndarray) -> dict[str, LanguageCount]:
    found = {}
    for name in ("zh", "en", "neither"):
        rows = [row for row, language in enumerate(languages) if (language or "neither") == name]
        found[name] = LanguageCount(len(rows), int(tokens_N[rows].sum()))
    return found
