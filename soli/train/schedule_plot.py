"""All schedules of a recipe over its tokens, as one picture: learning rate, batch, sequence length, gamma, lambda."""

from __future__ import annotations

from pathlib import Path

from soli.train.schedule import batch_sequences, bias_speed, learning_rate, mtp_weight, steps_before, tokens_after
from soli.train.settings import TrainSettings

POINTS = 2000  # of pretraining; an extension phase is flat and needs two
Row = tuple[float, float, float, float, float, float]  # tokens, then the five curves


def schedule_rows(settings: TrainSettings) -> list[Row]:
    """(tokens, learning rate, sequences, sequence length, gamma, lambda) along the run, pretraining then extension."""
    schedule = settings.schedule
    rows: list[Row] = []
    end = tokens_after(schedule, steps_before(schedule, schedule.total_tokens))
    for tokens in sorted({n * (schedule.total_tokens - 1) // (POINTS - 1) for n in range(POINTS)}):
        shape = (learning_rate(schedule, tokens), batch_sequences(schedule, tokens), schedule.sequence_length)
        rows.append((tokens, *shape, *_balance(settings, tokens)))
    for phase in settings.extension:
        for tokens in (end, end + phase.total_tokens):
            shape = (phase.learning_rate, phase.batch_sequences, phase.sequence_length)
            rows.append((tokens, *shape, *_balance(settings, tokens)))
        end += phase.total_tokens
    return rows


def save_schedule_plot(path: str | Path, settings: TrainSettings) -> None:
    """Write the curves as a PNG, one panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = ("learning rate", "batch, sequences", "sequence length", "gamma", "lambda")
    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    tokens, *curves = zip(*schedule_rows(settings), strict=True)
    axes = figure.subplots(len(titles), 1, sharex=True)
    for axis, title, curve in zip(axes, titles, curves, strict=True):
        axis.plot(tokens, curve, linewidth=1.2)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("tokens")
    figure.savefig(path, dpi=120, format="png")


def _balance(settings: TrainSettings, tokens: int) -> tuple[float, float]:
    return bias_speed(settings.balance, tokens), mtp_weight(settings.losses, tokens)
