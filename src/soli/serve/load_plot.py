"""The picture of a server under load: tokens per second, and times, over the arrival rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = {"first": "to the first piece of text", "between": "between pieces", "whole": "to the end"}


def save_load(path: str | Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Writes a PNG. Rows are `load_generator.measure`'s; the one without a rate, all at once, stands last."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    rows = sorted(rows, key=lambda row: (row["rate"] is None, row["rate"] or 0.0))
    names = ["at once" if row["rate"] is None else f"{row['rate']:g}" for row in rows]
    axes = list(figure.subplots(2, 2).flat)
    axes[0].plot(names, [row["tokens_per_second"] for row in rows], marker="o", linewidth=1.1)
    axes[0].set_title("generated", fontsize=10, loc="left")
    axes[0].set_ylabel("tokens per second", fontsize=8)
    for axis, (figure_name, label) in zip(axes[1:], PANELS.items(), strict=True):
        _times(axis, names, [row[figure_name] for row in rows], label)
    for axis in axes:
        axis.set_xlabel("requests per second", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def _times(axis: Any, names: Sequence[str], found: Sequence[dict[str, float] | None], label: str) -> None:
    """One line per percentile; a rate at which nothing was measured is a gap."""
    for percentile in next((one for one in found if one), {}):
        values = [one[percentile] if one else float("nan") for one in found]
        axis.plot(list(names), values, marker="o", linewidth=1.1, label=percentile)
    axis.set_title(label, fontsize=10, loc="left")
    axis.set_ylabel("milliseconds", fontsize=8)
    axis.legend(fontsize=8)
