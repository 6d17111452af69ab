"""What every picture of Soli shares: a figure drawn without a display, the style of a panel, and the PNG it becomes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from soli.atomic_file import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches whose panels do not overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_panel(axis: Axes, title: str, xlabel: str = "", ylabel: str = "") -> None:
    """Title at the left, labels and ticks small, a faint grid."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(ylabel, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure as a PNG; SoliError where that fails."""
    image = BytesIO()
    figure.savefig(image, dpi=DPI, format="png")
    replace_file(Path(path), image.getvalue())
