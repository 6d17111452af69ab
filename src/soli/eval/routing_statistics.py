"""Load and language preference of every expert, from how often each was chosen in each text.

Load: an expert's share of the choices in its layer, 1/E when fair; max violation is that of the paper's ablations,
(largest load - mean load) / mean load (DeepSeek-V3 report, section 4.5.3). Preference: the share of Chinese tokens
that use an expert against the share of English ones. Tokens of one text are not independent, so whole texts are the
unit: a difference counts only if it is larger than what shuffling the language labels over the texts brings about by
chance (`language_preference`).

Shapes: N texts, L MoE layers, E experts, M = L*E, P permutations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEWEST_TEXTS = 10  # of either language; with fewer, no answer is better than a guess
LEVEL = 0.01

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerLoad:
    """How one layer's work is spread. `share`: of the layer's choices, per expert, 1 in all; `idle`: never chosen."""

    layer: str
    share: tuple[float, ...]
    max_violation: float
    idle: tuple[int, ...]


@dataclass(frozen=True)
class ExpertPreference:
    """One expert's use by language. `chinese` and `english`: the share of the language's tokens that use it.

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


def layer_loads(names: Sequence[str], counts_LE: NDArray[np.int64]) -> list[LayerLoad]:
    """Load per layer from choices per expert; a layer without any choice counts as even."""
    loads = []
    for name, counts_E in zip(names, counts_LE, strict=True):
        total = int(counts_E.sum())
        share_E = counts_E / total if total else np.full(len(counts_E), 1 / len(counts_E))
        idle = tuple(int(expert) for expert in np.flatnonzero(counts_E == 0))
        loads.append(LayerLoad(name, tuple(share_E.tolist()), float(share_E.max() * len(share_E) - 1), idle))
    return loads


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
    beaten_M = permutations - np.searchsorted(np.sort(largest), np.abs(t_M), side="left")
    return (1 + beaten_M) / (1 + permutations)
