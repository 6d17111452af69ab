"""All schedules of a recipe over its tokens, as one picture: learning rate, batch, sequence length, gamma, lambda."""

from pathlib import Path
from typing import Any

from soli.analysis.figure import new_figure, save_figure
from soli.plan.training import planned_phases
from soli.train.schedule import batch_sequences, learning_rate, steps_before, tokens_after
from soli.train.settings import TrainSettings

POINTS = 2000  # of pretraining; an extension phase is flat and needs two
UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"))
Row = tuple[float, float, float, float, float, float]  # tokens, then the five curves


def schedule_rows(settings: TrainSettings) -> list[Row]:
    """(tokens, learning rate, sequences, sequence length, gamma, lambda) along the run, pretraining then extension."""
    schedule = settings.schedule
    points = [
        (tokens, learning_rate(schedule, tokens), batch_sequences(schedule, tokens), schedule.sequence_length)
        for tokens in sorted({n * (schedule.total_tokens - 1) // (POINTS - 1) for n in range(POINTS)})
    ]
    start = tokens_after(schedule, steps_before(schedule, schedule.total_tokens))
    for phase in settings.extension:
        end = start + phase.total_tokens
        shape = (phase.learning_rate, phase.batch_sequences, phase.sequence_length)
        points += [(start, *shape), (end, *shape)]
        start = end
    return [(*point, settings.balance.gamma_at(point[0]), settings.losses.mtp_weight_at(point[0])) for point in points]


def save_schedule_plot(path: str | Path, settings: TrainSettings) -> None:
    """Write the curves as a PNG, one panel each; dotted lines separate the phases, which are named at the top."""
    from matplotlib.ticker import FuncFormatter

    titles = ("learning rate", "batch, sequences", "sequence length, tokens", "gamma", "lambda")
    forms = ("{:.3g}", "{:,.0f}", "{:,.0f}", "{:g}", "{:g}")
    figure = new_figure(9, 9)
    tokens, *curves = zip(*schedule_rows(settings), strict=True)
    unit, unit_name = next(((size, name) for size, name in UNITS if tokens[-1] >= size), (1.0, ""))
    axes = figure.subplots(len(titles), 1, sharex=True)
    for axis, title, form, curve in zip(axes, titles, forms, curves, strict=True):
        axis.plot([count / unit for count in tokens], curve, linewidth=1.4)
        axis.set_title(title, fontsize=10, loc="left")
        if max(curve) > 8 * min(curve) > 0 and title.startswith("sequence"):
            axis.set_yscale("log", base=2)
            axis.set_yticks(sorted(set(curve)))
        else:
            axis.set_ylim(0, 1.1 * max(curve) or 1)
            lowest = max(curve) / 12  # the label of a lower tick would overlap that of 0
            axis.set_yticks(sorted({0.0, *(value for value in (curve[0], max(curve), curve[-1]) if value > lowest)}))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _, form=form: form.format(value)))
        axis.grid(axis="y", linewidth=0.4, alpha=0.6)
        axis.margins(x=0.01)
    _mark_phases(axes, settings, unit)
    axes[-1].set_xlabel(f"tokens, {unit_name}".rstrip(", "))
    save_figure(figure, path)


def _mark_phases(axes: Any, settings: TrainSettings, unit: float) -> None:
    """A dotted line where each phase ends, and the names of those wide enough for one."""
    phases = planned_phases(settings)
    total = sum(phase.tokens for phase in phases)
    start = 0
    for phase in phases:
        end = start + phase.tokens
        if phase.tokens > 0.08 * total:
            top = axes[0].get_xaxis_transform()
            middle = (start + end) / 2 / unit
            axes[0].text(middle, 1.03, phase.name, transform=top, ha="center", fontsize=9, color="0.35")
        for axis in axes:
            axis.axvline(end / unit, color="0.6", linewidth=0.7, linestyle=":")
        start = end
