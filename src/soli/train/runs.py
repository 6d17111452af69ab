"""Training runs read from their folders: what each has reached, how several differ at equal tokens, and their curves.

A run is a folder with the `metrics.jsonl` that soli/train/report.py writes. A line that returns to an earlier step
(Soli 0.1 wrote such lines when it resumed) replaces the lines from that step on; a last line without a line break is
still being written and is ignored. Any other line that cannot be read is rejected by number. Imports no torch.
"""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soli.analysis.figure import new_figure, save_figure, style_panel
from soli.errors import SoliError
from soli.input_files import parse_json, read_lines, read_object
from soli.sections import LARGEST_INT
from soli.train.run_lock import is_locked

METRICS = "metrics.jsonl"
RUNNING_SECONDS = 60.0  # a run without a lock whose metrics changed since then is running
RECENT = 10  # steps over which tokens per second are averaged

Curve = list[tuple[int, float]]  # (tokens, value), tokens increasing

# The curves that are compared; losses are in nats per token.
MEASURES = ("loss", "MTP loss", "held-out loss", "bits per byte", "max violation")
PANELS = {
    "loss": "nats per token",
    "MTP loss": "nats per target",
    "held-out loss": "nats per token",
    "max violation": "largest load / mean - 1, worst layer",
}
CROP = 0.02  # of the tokens: the values before may exceed a panel's range, so that later ones can be distinguished


@dataclass(frozen=True)
class RunMetrics:
    """One run's lines, in the order of their steps."""

    folder: Path
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    ended: str | None  # the reason in an "end" line: finished, signal, time, anomaly; None: running, killed, or old

    def curve(self, measure: str) -> Curve:
        """One of MEASURES over tokens; empty where the run has none. "max violation" is that of the worst layer."""
        if measure == "held-out loss":
            return [(line["tokens"], line["loss"]) for line in self.evaluations]
        if measure == "bits per byte":
            return [(line["tokens"], line["bits_per_byte"]) for line in self.evaluations]
        if measure == "max violation":
            loads = [(line["tokens"], [load["max_violation"] for load in line["load"].values()]) for line in self.steps]
            return [(tokens, max(violations)) for tokens, violations in loads if violations]
        if measure == "MTP loss":
            curve = [(line["tokens"], line["mtp"]) for line in self.steps]
            return curve if any(value for _, value in curve) else []  # 0 throughout: no MTP module
        return [(line["tokens"], line["loss"]) for line in self.steps]


@dataclass(frozen=True)
class RunSummary:
    """What a run has reached. None: not reached or not measured."""

    folder: str
    state: str  # finished, running or stopped
    step: int
    tokens: int
    seconds: float  # spent training
    loss: float | None  # nats per token, of the last step reported
    heldout_loss: float | None  # nats per token
    bits_per_byte: float | None
    tokens_per_second: float | None  # mean over the last steps reported
    stage: int = 0  # 0 pretraining, n the n-th extension phase


@dataclass(frozen=True)
class Point:
    """One measure of several runs at the last tokens that all of them have reached."""

    measure: str
    tokens: int | None  # None when no point is common
    values: list[float | None]  # per run, in order; interpolated linearly between two reports
    differences: list[float | None]  # from the first run


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder by name, or the folder itself when it is a run."""
    if not folder.is_dir():
        raise SoliError(f"there is no folder {folder}; give one that holds runs of soli train")
    if (folder / METRICS).is_file():
        return [folder]
    return sorted(file.parent for file in folder.glob(f"*/{METRICS}"))


def locate_run(name: str) -> Path:
    """The folder of a run, given as such or by its name in runs/."""
    for folder in (Path(name), Path("runs") / name):
        if (folder / METRICS).is_file():
            return folder
    raise SoliError(f"{name} is no run: neither it nor {Path('runs') / name} holds a {METRICS}; see soli runs list")


def read_metrics(folder: Path) -> RunMetrics:
    """A run's `metrics.jsonl`, checked line by line."""
    file = folder / METRICS
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    ended = None
    for number, line in read_lines(file):
        if not line.endswith(b"\n"):
            break
        entry = _read_line(line.decode("utf-8", errors="replace"), f"{file}, line {number}")
        lines = {"step": steps, "evaluation": evaluations}.get(entry["kind"])
        ended = str(entry.get("why")) if entry["kind"] == "end" else None
        if lines is None:
            continue
        if steps and entry["step"] < steps[-1]["step"]:
            steps[:] = [one for one in steps if one["step"] < entry["step"]]
            evaluations[:] = [one for one in evaluations if one["step"] < entry["step"]]
        if lines and lines[-1]["step"] == entry["step"]:
            lines.pop()
        lines.append(entry)
    return RunMetrics(folder, steps, evaluations, ended)


def summarize(metrics: RunMetrics, now: float | None = None) -> RunSummary:
    """What a run has reached at `now` (seconds of the epoch; default the clock)."""
    steps, evaluations = metrics.steps, metrics.evaluations
    start: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
    last = max([*steps[-1:], *evaluations[-1:], start], key=lambda line: line["step"])
    return RunSummary(
        folder=str(metrics.folder),
        state=_state(metrics, time.time() if now is None else now),
        step=last["step"],
        tokens=last["tokens"],
        seconds=last["seconds"],
        loss=steps[-1]["loss"] if steps else None,
        heldout_loss=evaluations[-1]["loss"] if evaluations else None,
        bits_per_byte=evaluations[-1]["bits_per_byte"] if evaluations else None,
        tokens_per_second=_speed(steps),
        stage=last.get("stage", 0),
    )


def compare_runs(runs: Sequence[RunMetrics]) -> list[Point]:
    """Each of MEASURES at the last tokens that all runs have reached, with the difference from the first run."""
    return [_common_point(measure, [run.curve(measure) for run in runs]) for measure in MEASURES]


def save_curves(path: str | Path, runs: Sequence[RunMetrics], names: Sequence[str]) -> None:
    """Write a PNG of loss, MTP loss, held-out loss and max violation over tokens; a run without one is left out of its
    panel."""
    figure = new_figure(11, 7)
    for axis, measure in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw_panel(axis, measure, [run.curve(measure) for run in runs], names)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(names)), fontsize=9)
    save_figure(figure, path)


def _draw_panel(axis: Any, measure: str, curves: Sequence[Curve], names: Sequence[str]) -> None:
    for curve, name in zip(curves, names, strict=True):
        tokens = [point[0] / 1e6 for point in curve]
        values = [point[1] for point in curve]
        axis.plot(tokens, values, label=name, linewidth=1.1, marker="o" if len(curve) < 20 else "", markersize=4)
    longest = max((curve[-1][0] for curve in curves if curve), default=0)
    later = [value for curve in curves for tokens, value in curve if tokens >= CROP * longest]
    if later and max(later) > min(later):
        margin = 0.05 * (max(later) - min(later))
        axis.set_ylim(min(later) - margin, max(later) + margin)
    style_panel(axis, measure, "million tokens", PANELS[measure])


def _common_point(measure: str, curves: Sequence[Curve]) -> Point:
    tokens = min((curve[-1][0] for curve in curves if curve), default=0)
    if any(not curve or curve[0][0] > tokens for curve in curves):
        nothing: list[float | None] = [None] * len(curves)
        return Point(measure, None, nothing, nothing)
    values = [float(np.interp(tokens, *np.transpose(curve))) for curve in curves]
    return Point(measure, tokens, list(values), [value - values[0] for value in values])


def _read_line(line: str, where: str) -> dict[str, Any]:
    """One line as a dict with the numbers that its kind requires."""
    try:
        entry = parse_json(line, "it", finite=False)
        of_kind = {"step": ("loss", "mtp", "tokens_per_second"), "evaluation": ("loss", "bits_per_byte")}
        numbers = ("step", "tokens", "seconds", *of_kind.get(entry["kind"], ()))
        wrong = [key for key in numbers if not _is_number(entry[key])]
        wrong += [key for key in ("stage",) if type(entry.get(key, 0)) is not int]
        if entry["kind"] == "step":
            wrong += [name for name, load in entry["load"].items() if not _is_number(load["max_violation"])]
    except SoliError as error:
        raise SoliError(f"{where} is not what soli train writes ({error})") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise SoliError(f"{where} is not what soli train writes ({type(error).__name__}: {error})") from None
    if wrong:
        raise SoliError(f"{where} is not what soli train writes: {wrong[0]} is not a number")
    return entry


def _is_number(value: Any) -> bool:
    """Whether a value is a float, NaN included, or an integer of 64 bits."""
    return isinstance(value, float) or (type(value) is int and abs(value) <= LARGEST_INT)


def _state(metrics: RunMetrics, now: float) -> str:
    """A recorded end decides; then the run's lock; for runs without one, how old their metrics are; then the end of the
    schedule, which runs of Soli 0.1 did not record."""
    if metrics.ended is not None:
        return "finished" if metrics.ended == "finished" else "stopped"
    is_running = is_locked(metrics.folder)
    if is_running is None:
        age = abs(now - (metrics.folder / METRICS).stat().st_mtime)  # the clock may have been set back since
        is_running = age < max(RUNNING_SECONDS, 2 * _longest_pause(metrics.steps))
    if is_running:
        return "running"
    total = _total_tokens(metrics.folder)
    return "finished" if total and metrics.steps and metrics.steps[-1]["tokens"] >= total else "stopped"


def _longest_pause(steps: Sequence[dict[str, Any]]) -> float:
    """Seconds of training between two reports, the longest of the recent ones: a slow run has not stopped."""
    seconds = [line["seconds"] for line in steps[-RECENT:]]
    return max((later - earlier for earlier, later in itertools.pairwise(seconds)), default=0.0)


def _total_tokens(folder: Path) -> int | None:
    """Length of the schedule that the run started with; None when its recipe cannot be read."""
    from soli.train.settings import SECTIONS, read_settings

    try:
        recipe = read_object(folder / "recipe.resolved.json")
        extension = {"extension": recipe.get("extension", ())}
        return read_settings({name: recipe.get(name, {}) for name in ("model", *SECTIONS)} | extension).total_tokens
    except (KeyError, SoliError):
        return None


def _speed(steps: Sequence[dict[str, Any]]) -> float | None:
    rates = [line["tokens_per_second"] for line in steps[-RECENT:]]
    return statistics.harmonic_mean(rates) if rates and min(rates) > 0 else None
