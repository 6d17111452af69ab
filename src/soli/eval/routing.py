"""The routing of many texts: each expert's load, and whether it prefers Chinese or English, as numbers and a picture.

Load: an expert's share of the selections in its layer, 1/E when even. Preference: the share of Chinese tokens that
select an expert against the share of English ones. Tokens of one text are not independent, so whole texts are the unit:
a difference counts only if it is larger than what shuffling the language labels over the texts brings about by chance
(`language_preference`).

Shapes: N texts, L MoE layers, E experts, M = L*E, P permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from soli.analysis.figure import new_figure, save_figure
from soli.data.text import language_of
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.eval.scoring import LayerLoad, OnProgress, document_parts, layer_loads, score_sequences

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWEST_TEXTS = 10  # of either language: with fewer the test has no power
LEVEL = 0.01
CELL_INCHES = 0.28
LARGEST_RATIO = 4.0  # log2: from 16 times as often in English to 16 times as often in Chinese

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ExpertPreference:
    """One expert's use by language. `chinese` and `english`: the share of the language's tokens that select it.

    `log2_ratio`: of the two, above 0 for Chinese. `p`: the chance that shuffled labels bring about a difference as
    large for *any* expert of the model. `prefers`: "zh" or "en" where p is below LEVEL, else None.
    """

    layer: str
    expert: int
    chinese: float
    english: float
    log2_ratio: float
    t: float
    p: float
    prefers: str | None


@dataclass(frozen=True)
class LanguageCount:
    """How much of the texts is in one language ("neither": digits and punctuation alone)."""

    texts: int
    tokens: int


@dataclass(frozen=True)
class RoutingReport:
    """Load per layer, preference per expert (empty when there are too few texts of a language), and the parameters of
    the test.

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
    on_progress: OnProgress = lambda _: None,
) -> RoutingReport:
    """Reads every text once, in parts where it is longer than the model. Rejects a model without routed experts."""
    names = [name for name, _ in text_model.model.moe_layers() if name.startswith("layers.")]
    if not names:
        raise SoliError("this model has no routed experts, so that there is no routing to report")
    parts = [
        (number, part) for number, text in enumerate(texts) for part in document_parts(text_model, text, end=False)
    ]
    experts = text_model.model.config.n_routed_experts
    counts_NLE = np.zeros((len(texts), len(names), experts), dtype=np.int64)
    tokens_N = np.zeros(len(texts), dtype=np.int64)
    sequences = [part for _, part in parts]
    context = len(text_model.text_prefix)
    for score in score_sequences(text_model.model, sequences, context=context, score=False, on_progress=on_progress):
        number = parts[score.number][0]
        counts_NLE[number] += score.counts_LE
        tokens_N[number] += score.tokens
    languages = [language_of(text) for text in texts]
    return RoutingReport(
        languages=_language_counts(languages, tokens_N),
        loads=layer_loads(names, counts_NLE.sum(axis=0)),
        preferences=language_preference(names, counts_NLE, tokens_N, languages, permutations=permutations, seed=seed),
        permutations=permutations,
        seed=seed,
    )


def _language_counts(languages: Sequence[str | None], tokens_N: np.ndarray) -> dict[str, LanguageCount]:
    counts = {}
    for name in ("zh", "en", "neither"):
        rows = [row for row, language in enumerate(languages) if (language or "neither") == name]
        counts[name] = LanguageCount(len(rows), int(tokens_N[rows].sum()))
    return counts


def language_preference(
    names: Sequence[str],
    counts_NLE: NDArray[np.int64],
    tokens_N: NDArray[np.int64],
    languages: Sequence[str | None],
    *,
    permutations: int = 2000,
    seed: int = 0,
) -> list[ExpertPreference]:
    """Every expert's preference, layer by layer; empty when a language has fewer than FEWEST_TEXTS texts.

    The statistic is the difference of two ratio estimates over its standard error, with texts as clusters. Its null
    distribution comes from shuffling the labels over the texts; each expert is compared with the largest statistic of
    all experts in every shuffle (Westfall and Young's max-T), so p is already corrected for testing all of them at
    once. Texts in neither language are left out.
    """
    used = [n for n, language in enumerate(languages) if language in ("en", "zh") and tokens_N[n] > 0]
    chinese_N = np.array([languages[n] == "zh" for n in used], dtype=bool)
    if min(int(chinese_N.sum()), int((~chinese_N).sum())) < FEWEST_TEXTS:
        return []
    counts_NM = counts_NLE[used].reshape(len(used), -1).astype(np.float64)
    moments = _Moments(counts_NM, tokens_N[used].astype(np.float64))
    zh_M, en_M, t_M = (row[0] for row in moments.compare(chinese_N[None]))
    p_M = _family_wise_p(t_M, moments, chinese_N, permutations, np.random.default_rng(seed))
    # Half a token on either side keeps the ratio finite for an expert that one language never uses.
    half_zh, half_en = 0.5 / moments.tokens_N[chinese_N].sum(), 0.5 / moments.tokens_N[~chinese_N].sum()
    log2_M = np.log2((zh_M + half_zh) / (en_M + half_en))
    experts = counts_NLE.shape[2]
    return [
        ExpertPreference(
            layer=names[m // experts],
            expert=m % experts,
            chinese=float(zh_M[m]),
            english=float(en_M[m]),
            log2_ratio=float(log2_M[m]),
            t=float(t_M[m]),
            p=float(p_M[m]),
            prefers=None if p_M[m] >= LEVEL else "zh" if t_M[m] > 0 else "en",
        )
        for m in range(len(t_M))
    ]


class _Moments:
    """Sums over texts from which both languages' shares and their variances follow, for many labellings at once."""

    def __init__(self, counts_NM: Array, tokens_N: Array) -> None:
        self.counts_NM, self.tokens_N = counts_NM, tokens_N
        self._squares_NM = counts_NM**2
        self._products_NM = counts_NM * tokens_N[:, None]

    def compare(self, chinese_PN: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
        """Chinese share, English share and studentised difference, each (P,M), for P labellings of the texts."""
        zh_PM, zh_variance_PM = self._share(chinese_PN.astype(np.float64))
        en_PM, en_variance_PM = self._share((~chinese_PN).astype(np.float64))
        return zh_PM, en_PM, (zh_PM - en_PM) / np.sqrt(zh_variance_PM + en_variance_PM)

    def _share(self, weight_PN: Array) -> tuple[Array, Array]:
        tokens_P1 = (weight_PN @ self.tokens_N)[:, None]
        share_PM = weight_PN @ self.counts_NM / tokens_P1
        # Sum of (c - s n)^2 over the texts: the variance of a ratio estimate with texts as clusters.
        residual_PM = (
            weight_PN @ self._squares_NM
            - 2 * share_PM * (weight_PN @ self._products_NM)
            + share_PM**2 * (weight_PN @ self.tokens_N**2)[:, None]
        )
        # One token's worth of variance at least, so that an expert used by nobody, or evenly by all, divides by no
        # zero.
        return share_PM, np.maximum(residual_PM, 1.0) / tokens_P1**2


def _family_wise_p(
    t_M: Array, moments: _Moments, chinese_N: NDArray[np.bool_], permutations: int, rng: np.random.Generator
) -> Array:
    largest = np.empty(permutations)
    chunk = max(1, 4_000_000 // len(t_M))
    for start in range(0, permutations, chunk):
        size = min(chunk, permutations - start)
        shuffled_PN = rng.permuted(np.tile(chinese_N, (size, 1)), axis=1)
        largest[start : start + size] = np.abs(moments.compare(shuffled_PN)[2]).max(axis=1)
    exceeding_M = permutations - np.searchsorted(np.sort(largest), np.abs(t_M), side="left")
    return (1 + exceeding_M) / (1 + permutations)


def save_heat_map(path: str | Path, loads: Sequence[LayerLoad], preferences: Sequence[ExpertPreference]) -> None:
    """Writes a PNG, layers down and experts across: load above, preference below. A dot marks a preference that is not
    chance; without preferences only the load is drawn."""
    load_LE = np.array([np.array(load.share) * len(load.share) for load in loads])
    layers, experts = load_LE.shape
    panels = 2 if preferences else 1
    height = panels * (1.3 + max(1.2, layers * CELL_INCHES))
    figure = new_figure(max(7.0, 1.8 + experts * CELL_INCHES), height)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    largest = max(2.0, float(load_LE.max()))
    _draw_panel(figure, axes[0], load_LE, loads, "Load: 1 is an even share", "viridis", (0.0, largest))
    if preferences:
        ratio_LE = np.array([preference.log2_ratio for preference in preferences]).reshape(layers, experts)
        title = "Preference, log2 of Chinese over English use; a dot: not chance (p < 0.01 over all experts)"
        _draw_panel(figure, axes[1], ratio_LE, loads, title, "RdBu_r", (-LARGEST_RATIO, LARGEST_RATIO))
        dots = [(m % experts, m // experts) for m, preference in enumerate(preferences) if preference.prefers]
        if dots:
            axes[1].scatter(*zip(*dots, strict=True), s=6, c="black")
    save_figure(figure, path)


def _draw_panel(
    figure: Figure,
    axis: Axes,
    values_LE: np.ndarray,
    loads: Sequence[LayerLoad],
    title: str,
    colours: str,
    limits: tuple[float, float],
) -> None:
    image = axis.imshow(values_LE, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_yticks(range(len(loads)), [load.layer for load in loads], fontsize=8)
    axis.set_xlabel("expert", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    figure.colorbar(image, ax=axis, pad=0.01)
