"""The picture of cpu.py: tokens per second of each contender on the small model, by the width of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = {
    "small-decode": "one request, decoding",
    "small-prefill": "one prompt of 512 tokens",
    "small-batch": "16 requests at once, 128 in, 128 out",
}
COLOURS = {"Soli": "#c8452e", "llama.cpp": "#4c72b0", "transformers": "#8c8c8c", "vLLM": "#55a868", "memory": "#d9d2c5"}


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the panels for which there are rows; nothing where there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {title: found for key, title in PANELS.items() if (found := [row for row in rows if row["row"] == key])}
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (title, found) in zip(axes[0], panels.items(), strict=True):
        bars = _bars(found)
        for at, (_, who, spread) in enumerate(bars):
            error = [[spread["median"] - spread["lowest"]], [spread["highest"] - spread["median"]]]
            axis.bar(at, spread["median"], color=COLOURS[who], yerr=error, ecolor="#404040", capsize=2)
        axis.set_xticks(range(len(bars)), [label for label, _, _ in bars], rotation=60, ha="right", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("tokens per second")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _bars(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Mapping[str, float]]]:
    """Label, contender and spread of every bar, each contender once for a width."""
    bars: dict[str, tuple[str, Mapping[str, float]]] = {}
    for row in rows:
        kind = row["what"].split(", ")[2]
        bars.setdefault(f"Soli {kind}", ("Soli", row["soli"]))
        for name, spread in row["peers"].items():
            who = name.split()[0]
            bars.setdefault(f"memory, {kind}" if who == "memory" else name, (who, spread))
    return [(label, who, spread) for label, (who, spread) in bars.items()]
