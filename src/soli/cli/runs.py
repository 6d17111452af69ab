"""`soli runs list` shows the state of training runs; `soli runs compare A B` compares them at equal tokens."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soli.errors import SoliError

if TYPE_CHECKING:
    from soli.train.runs import Point, RunSummary

app = typer.Typer(help="List training runs and compare them.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the runs, or one run.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the runs as a JSON list.")] = False,
) -> None:
    """Show each run's step, tokens, losses, speed, and whether it is finished, stopped or running.

    Running: its metrics changed within the last minute, or within twice the time it takes between two reports.
    """
    from soli.train.runs import find_runs, read_metrics, summarize

    summaries = [summarize(read_metrics(run)) for run in find_runs(folder)]
    if as_json:
        _print_json([dataclasses.asdict(summary) for summary in summaries])
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
    from soli.train.runs import compare_runs, locate_run, read_metrics

    folders = [locate_run(name) for name in runs]
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise SoliError("soli runs compare takes different runs; give two or more, each once")
    metrics = [read_metrics(folder) for folder in folders]
    points, names = compare_runs(metrics), _names(folders)
    if png is not None:
        from soli.train.runs import save_curves

        save_curves(png, metrics, names)
    if as_json:
        _print_json(
            {"runs": [str(folder) for folder in folders], "points": [dataclasses.asdict(one) for one in points]}
        )
    else:
        _print_points(points, names)


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, where these differ; else whole paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _print_runs(summaries: Sequence[RunSummary]) -> None:
    from rich import box
    from rich.table import Table

    from soli.cli._shared.console import stdout_console
    from soli.train.schedule import stage_name

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("run", "state"):
        table.add_column(title, no_wrap=title == "state")
    for title in ("step", "M tokens", "loss", "held-out", "bits/byte", "tok/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in summaries:
        numbers = (_number(one.loss), _number(one.heldout_loss), _number(one.bits_per_byte))
        speed = _number(one.tokens_per_second, ",.0f")
        state = f"{one.state}, {stage_name(one.stage)}" if one.stage else one.state
        table.add_row(one.folder, state, f"{one.step:,}", f"{one.tokens / 1e6:,.2f}", *numbers, speed)
    stdout_console().print(table)


def _print_points(points: Sequence[Point], names: Sequence[str]) -> None:
    from rich import box
    from rich.table import Table

    from soli.cli._shared.console import stdout_console

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("at M tokens", names[0]):
        table.add_column(title, justify="right")
    for name in names[1:]:
        table.add_column(name, justify="right")
        table.add_column("difference", justify="right")
    for point in points:
        row = [_number(point.values[0])]
        for value, difference in zip(point.values[1:], point.differences[1:], strict=True):
            row += [_number(value), _number(difference, "+.4f")]
        table.add_row(point.measure, "-" if point.tokens is None else f"{point.tokens / 1e6:,.2f}", *row)
    stdout_console().print(table)


def _number(value: float | None, spec: str = ".4f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, spec)


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
