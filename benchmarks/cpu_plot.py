"""The pictures of cpu.py and serve.py: tokens per second of each contender on the small model by the width of its
weights, and how long tokens take under load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = {
    "small-decode": "one request, decoding",
    "small-prefill": "one prompt of 512 tokens",
    "small-batch": "batch 16, 128 in, 128 out",
}
FIGURES = {"first, median": "to the first token, median", "between, 95 of 100": "between tokens, 95 of 100"}
COLOURS = {"Soli": "#c8452e", "llama.cpp": "#4c72b0", "transformers": "#8c8c8c", "vLLM": "#55a868", "memory": "#d9d2c5"}
Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows, file: Path) -> None:
    """Bars for each of PANELS for which there are rows; no picture where there are none."""
    panels = {title: [row for row in rows if row["row"] == key] for key, title in PANELS.items()}
    panels = {title: panel_rows for title, panel_rows in panels.items() if panel_rows}
    if panels:
        figure, axes = _panels(len(panels))
        for axis, (title, panel_rows) in zip(axes, panels.items(), strict=True):
            _draw_bars(axis, title, panel_rows)
        _save(figure, file)


def draw_serving(rows: Rows, file: Path) -> None:
    """Bars of the throughput, and a line for each contender over the rates of arrival; no picture without rows."""
    together = [row for row in rows if row["row"] == "throughput"]
    loaded = {title: [row for row in rows if row.get("figure") == key] for key, title in FIGURES.items()}
    loaded = {title: panel_rows for title, panel_rows in loaded.items() if panel_rows}
    if not together and not loaded:
        return
    figure, axes = _panels(len(loaded) + bool(together))
    if together:
        _draw_bars(axes[0], PANELS["small-batch"], together)
    for axis, (title, panel_rows) in zip(axes[-len(loaded) :] if loaded else (), loaded.items(), strict=True):
        for label, who, rates, times in _curves(panel_rows):
            axis.plot(rates, times, marker="o", color=COLOURS[who], linestyle=_style(label), label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("requests per second")
        axis.set_ylabel("milliseconds")
        axis.set_yscale("log")
        axis.legend(fontsize=8)
    _save(figure, file)


def _panels(count: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(5 * count, 4), squeeze=False)
    return figure, list(axes[0])


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _draw_bars(axis: Any, title: str, rows: Rows) -> None:
    bars = _bars(rows)
    for at, (_, who, spread) in enumerate(bars):
        error = [[spread["median"] - spread["lowest"]], [spread["highest"] - spread["median"]]]
        axis.bar(at, spread["median"], color=COLOURS[who], yerr=error, ecolor="#404040", capsize=2)
    axis.set_xticks(range(len(bars)), [label for label, _, _ in bars], rotation=60, ha="right", fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("tokens per second")
    axis.spines[["top", "right"]].set_visible(False)


def _bars(rows: Rows) -> list[tuple[str, str, Mapping[str, float]]]:
    """Label, contender and spread of every bar, each contender once for a width."""
    bars: dict[str, tuple[str, Mapping[str, float]]] = {}
    for row in rows:
        kind = _kind(row)
        bars.setdefault(f"Soli {kind}", ("Soli", row["soli"]))
        for name, spread in row["peers"].items():
            who = name.split()[0]
            bars.setdefault(f"memory, {kind}" if who == "memory" else name, (who, spread))
    return [(label, who, spread) for label, (who, spread) in bars.items()]


def _curves(rows: Rows) -> list[tuple[str, str, list[float], list[float]]]:
    """Label, contender, rates and medians of every line."""
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        for name, spread in {f"Soli {_kind(row)}": row["soli"], **row["peers"]}.items():
            curves.setdefault(name, {})[row["rate"]] = spread["median"]
    return [(name, name.split()[0], sorted(medians), [medians[rate] for rate in sorted(medians)])
            for name, medians in curves.items()]  # fmt: skip


def _kind(row: Mapping[str, Any]) -> str:
    return row["what"].split(", ")[2].split(":")[0]


def _style(label: str) -> str:
    return "-" if label.endswith("bf16") else "--" if label.endswith(("int8", "q8_0")) else ":"
