"""A routing report as one picture: layers down, experts across; load above, preference for Chinese or English below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soli.eval.routing_statistics import ExpertPreference, LayerLoad

SIDE = 0.28  # inches per cell
LARGEST_RATIO = 4.0  # log2: from 16 times as often in English to 16 times as often in Chinese


def save_heat_map(path: str | Path, loads: Sequence[LayerLoad], preferences: Sequence[ExpertPreference]) -> None:
    """Writes a PNG. A dot marks a preference that is not chance; without preferences only the load is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    load_LE = np.array([np.array(load.share) * len(load.share) for load in loads])
    layers, experts = load_LE.shape
    panels = 2 if preferences else 1
    size = (max(7.0, 1.8 + experts * SIDE), panels * (1.3 + max(1.2, layers * SIDE)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    top = max(2.0, float(load_LE.max()))
    _panel(figure, axes[0], load_LE, loads, "Load: 1 is an even share", "viridis", (0.0, top))
    if preferences:
        ratio_LE = np.array([one.log2_ratio for one in preferences]).reshape(layers, experts)
        title = "Preference, log2 of Chinese over English use; a dot: not chance (p < 0.01 over all experts)"
        _panel(figure, axes[1], ratio_LE, loads, title, "RdBu_r", (-LARGEST_RATIO, LARGEST_RATIO))
        marked = [(at % experts, at // experts) for at, one in enumerate(preferences) if one.prefers]
        if marked:
            axes[1].scatter(*zip(*marked, strict=True), s=6, c="black")
    figure.savefig(path, dpi=120, format="png")


def _panel(
    figure: Any,
    axis: Any,
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
