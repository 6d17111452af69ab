"""`soli runs list` shows the state of training runs; `soli runs compare A B` compares them at equal tokens."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Column, Table

from soli.cli._shared.console import number_columns, print_json, stdout_console
from soli.errors import SoliError
from soli.train.runs import (
    Point,
    RunSummary,
    compare_runs,
    find_runs,
    locate_run,
    read_metrics,
    save_curves,
    summarize,
)
from soli.train.schedule import stage_name

app = typer.Typer(help="List training runs and compare them.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the runs, or one run.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the runs as a JSON list.")] = False,
) -> None:
    """Show each run's step, tokens, losses, speed, and whether it is finished, stopped or running.

    Running: a process holds the run's lock; for a run without one, its metrics changed within the last minute, or
    within twice the time it takes between two reports.
    """
    summaries = [summarize(read_metrics(run)) for run in find_runs(folder)]
    if as_json:
        print_json(_finite([dataclasses.asdict(summary) for summary in summaries]), indent=2)
    elif summaries:
        _print_runs(summaries)
    else:
        print(f"no runs in {folder}: soli train writes them there")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="A B [C...]", help="Folders of runs, or their names in runs/.")],
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw their curves to this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the points as JSON.")] = False,
) -> None:
    """Compare runs at the last tokens that all have reached; each difference is from the first run."""
    folders = [locate_run(name) for name in runs]
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise SoliError("soli runs compare takes different runs; give two or more, each once")
    metrics = [read_metrics(folder) for folder in folders]
    points, names = compare_runs(metrics), _names(folders)
    if png is not None:
        save_curves(png, metrics, names)
    if as_json:
        names_and_points = {"runs": list(map(str, folders)), "points": [dataclasses.asdict(one) for one in points]}
        print_json(_finite(names_and_points), indent=2)
    else:
        _print_points(points, names)


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, where these differ; else whole paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _print_runs(summaries: Sequence[RunSummary]) -> None:
    numbers = number_columns("step", "M tokens", "loss", "held-out", "bits/byte", "tok/s", no_wrap=True)
    table = Table("run", Column("state", no_wrap=True), *numbers, box=box.SIMPLE_HEAD, pad_edge=False)
    for one in summaries:
        state = f"{one.state}, {stage_name(one.stage)}" if one.stage else one.state
        losses = map(_number, (one.loss, one.heldout_loss, one.bits_per_byte))
        speed = _number(one.tokens_per_second, ",.0f")
        table.add_row(one.folder, state, f"{one.step:,}", f"{one.tokens / 1e6:,.2f}", *losses, speed)
    stdout_console().print(table)


def _print_points(points: Sequence[Point], names: Sequence[str]) -> None:
    titles = ["at M tokens", names[0], *(title for name in names[1:] for title in (name, "difference"))]
    table = Table(Column("", no_wrap=True), *number_columns(*titles), box=box.SIMPLE_HEAD, pad_edge=False)
    for point in points:
        row = [_number(point.values[0])]
        for value, difference in zip(point.values[1:], point.differences[1:], strict=True):
            row += [_number(value), _number(difference, "+.4f")]
        table.add_row(point.measure, "-" if point.tokens is None else f"{point.tokens / 1e6:,.2f}", *row)
    stdout_console().print(table)


def _number(value: float | None, spec: str = ".4f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, spec)


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
