"""`soli train RECIPE`: train a model from a recipe; run again with the same --out and it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, such as nano-zh-en, or its folder or TOML file.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one value of the recipe.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/RECIPE. A whole checkpoint in it is resumed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would take, and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: the plan and the resolved recipe as JSON.")
    ] = False,
    devices: Annotated[int, typer.Option(min=1, help="With --dry-run: devices that share the run.")] = 1,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="With --dry-run: model FLOPs utilisation.")] = 0.4,
    device_tflops: Annotated[
        float,
        typer.Option(min=0.001, help="With --dry-run: a device's peak; the default is an H100's or H800's, bf16."),
    ] = 989,
    plot: Annotated[Path | None, typer.Option(help="With --dry-run: draw all schedules into this PNG file.")] = None,
) -> None:
    """Train a model from a recipe; a stopped run resumes."""
    from soli.data.recipe import data_folder, find_recipe, load_recipe
    from soli.train.settings import as_recipe, read_settings

    path = find_recipe(recipe)
    table = load_recipe(path, list(assignments or []))
    settings, data = read_settings(table), table.get("data", {})
    if (as_json or plot) and not dry_run:
        raise typer.BadParameter("--json and --plot go with --dry-run")
    if dry_run:
        import dataclasses
        import json

        from soli.cli.train_plan import print_plan
        from soli.train.plan import plan_run

        plan = plan_run(settings, devices, mfu, device_tflops)
        if plot is not None:
            from soli.train.schedule_plot import save_schedule_plot

            save_schedule_plot(plot, settings)
        if as_json:
            document = {"plan": dataclasses.asdict(plan), "recipe": as_recipe(settings, data)}
            print(json.dumps(document, indent=2, ensure_ascii=False))
        else:
            print_plan(plan, devices, mfu, device_tflops)
        return
    from soli.train.loop import train as run_training
    from soli.train.setup import prepare

    run_training(prepare(settings, data, data_folder(table), out or Path("runs") / path.parent.name))
