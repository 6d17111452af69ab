"""`soli train RECIPE`: train a model from a recipe; run again with the same --out and it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soli.cli._shared.options import Assignments

if TYPE_CHECKING:
    from soli.train.settings import TrainSettings


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, such as nano-zh-en, or its folder or TOML file.")],
    assignments: Assignments = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/RECIPE. The last checkpoint in it is resumed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run needs, and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: the plan and the resolved recipe as JSON.")
    ] = False,
    devices: Annotated[int, typer.Option(min=1, help="With --dry-run: devices that share the run.")] = 1,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="With --dry-run: model FLOPs utilisation.")] = 0.4,
    device_tflops: Annotated[
        float,
        typer.Option(min=0.001, help="With --dry-run: a device's peak; the default is an H100's or H800's, bf16."),
    ] = 989,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="With --dry-run: time this device for about a second.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="With --dry-run: draw all schedules into this PNG file.")] = None,
) -> None:
    """Train a model from a recipe; a stopped run resumes."""
    from soli.data.recipe import find_recipe, load_recipe
    from soli.recipes import read_data_config
    from soli.train.settings import read_settings

    path = find_recipe(recipe)
    table = load_recipe(path, assignments or [])
    settings = read_settings(table)
    folder = Path(read_data_config(table).folder)
    data = table.get("data", {})
    if (as_json or plot) and not dry_run:
        raise typer.BadParameter("--json and --plot go with --dry-run")
    if dry_run:
        _dry_run(settings, data, devices, mfu, device_tflops, measure, as_json, plot)
        return
    from soli.train.setup import prepare
    from soli.train.trainer import train as run_training

    run_training(prepare(settings, data, folder, out or Path("runs") / path.parent.name))


def _dry_run(
    settings: TrainSettings,
    data: dict[str, Any],
    devices: int,
    mfu: float,
    device_tflops: float,
    measure: bool,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Print what a run needs; with `plot`, draw its schedules into that file."""
    import dataclasses
    import json

    from soli.cli._shared.plan_tables import print_plan
    from soli.plan.training import hours_here, plan_run
    from soli.train.settings import as_recipe

    here = None
    if measure:
        from soli.plan.throughput import measure_device

        here = measure_device(settings)
    precision = here.computes if here else None
    kind = here.kind if here else "cpu" if settings.run.device == "cpu" else "cuda"
    plan = plan_run(settings, devices, mfu, device_tflops, precision, kind)
    if plot is not None:
        from soli.plan.schedule_plot import save_schedule_plot

        save_schedule_plot(plot, settings)
    if as_json:
        document: dict[str, Any] = {"plan": dataclasses.asdict(plan), "recipe": as_recipe(settings, data)}
        if here is not None:
            document["device"] = {
                **dataclasses.asdict(here),
                "hours": hours_here(settings, plan.flops, here.tflops, here.precision),
            }
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        print_plan(plan, settings, data.get("fim_rate", 0.0), devices, mfu, device_tflops, here)
