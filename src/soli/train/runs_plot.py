"""Several runs as one picture: loss, MTP loss, held-out loss and the worst layer's max violation, over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soli.analysis.figure import new_figure, save_figure, style_panel
from soli.train.runs import Curve, RunMetrics

PANELS = {
    "loss": "nats per token",
    "MTP loss": "nats per target",
    "held-out loss": "nats per token",
    "max violation": "largest load / mean - 1, worst layer",
}
SETTLED = 0.02  # of the tokens: what lies before may leave the picture, so that the rest can be told apart


def save_curves(path: str | Path, runs: Sequence[RunMetrics], names: Sequence[str]) -> None:
    """Writes a PNG; a run without a measure is missing from its panel."""
    figure = new_figure(11, 7)
    for axis, measure in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _panel(axis, measure, [run.curve(measure) for run in runs], names)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(names)), fontsize=9)
    save_figure(figure, path)


def _panel(axis: Any, measure: str, curves: Sequence[Curve], names: Sequence[str]) -> None:
    for curve, name in zip(curves, names, strict=True):
        tokens, values = [point[0] / 1e6 for point in curve], [point[1] for point in curve]
        axis.plot(tokens, values, label=name, linewidth=1.1, marker="o" if len(curve) < 20 else "", markersize=4)
    longest = max((curve[-1][0] for curve in curves if curve), default=0)
    settled = [value for curve in curves for tokens, value in curve if tokens >= SETTLED * longest]
    if settled and max(settled) > min(settled):
        margin = 0.05 * (max(settled) - min(settled))
        axis.set_ylim(min(settled) - margin, max(settled) + margin)
    style_panel(axis, measure, "million tokens", PANELS[measure])
