"""`soli train RECIPE`: train a model from a recipe; run again with the same --out and it resumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import join, quote
from typing import Annotated

import typer

from soli.cli._shared.options import Assignments, Threads, is_on_command_line, use_threads
from soli.cli._shared.training_plan import MFU, print_training_plan
from soli.data.recipe import DataConfig, find_recipe, load_recipe
from soli.errors import SoliError
from soli.plan.devices import DEVICES
from soli.recipes import read_data_config
from soli.train.settings import read_settings

# Options that only planning reads, by parameter.
PLANNING = {
    "as_json": "--json",
    "devices": "--devices",
    "device": "--device",
    "mfu": "--mfu",
    "device_tflops": "--device-tflops",
    "measure": "--measure/--no-measure",
    "plot": "--plot",
}
DATA_FILES = ("meta.json", "tokenizer.json", "train.bin", "valid.bin")


def train(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe's name, such as nano-zh-en, or its folder or TOML file.")],
    assignments: Assignments = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/RECIPE. The last checkpoint in it is resumed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run needs, and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: the plan and the resolved recipe as JSON.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=10**9, help="With --dry-run: devices that share the run; default those of [parallel]."),
    ] = None,
    device: Annotated[
        str, typer.Option(help=f"With --dry-run: which device a mesh of several is for: {', '.join(DEVICES)}.")
    ] = "h800",
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="With --dry-run: model FLOPs utilisation.")] = MFU,
    device_tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="With --dry-run: a device's peak in bf16; the default is that of --device."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="With --dry-run: time this device for about a second.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="With --dry-run: draw all schedules into this PNG file.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Start so many processes on this machine, as [parallel] shares the run."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train a model from a recipe; a stopped run resumes."""
    planning = [option for name, option in PLANNING.items() if is_on_command_line(ctx, name)]
    if planning and not dry_run:
        raise typer.BadParameter(f"{' and '.join(planning)} only with --dry-run; a run's own sizes are in [parallel]")
    if processes is not None and dry_run:
        raise typer.BadParameter("--processes starts a run; with --dry-run say --devices")
    path = find_recipe(recipe)
    table = load_recipe(path, assignments or [])
    settings = read_settings(table)
    data_config = read_data_config(table)
    data = table.get("data", {})
    use_threads(threads)
    if dry_run:
        number = settings.parallel.world if devices is None else devices
        print_training_plan(settings, data, number, mfu, device_tflops, measure, as_json, plot, device)
        return
    _require_data(data_config, recipe, assignments or [])
    from soli.parallel.ranks import joined, launched_ranks

    folder = out or Path("runs") / path.parent.name
    if processes is not None and processes > 1:
        settings.parallel.require_world(processes)
        if launched_ranks().world > 1:
            raise SoliError("--processes starts the processes itself; leave it out under torchrun")
        from soli.parallel.launch import launch

        options = [f"--set={assignment}" for assignment in assignments or []]
        options += [] if threads is None else [f"--threads={threads}"]
        raise typer.Exit(launch(["train", recipe, f"--out={folder}", *options], processes))
    from soli.train.setup import prepare
    from soli.train.trainer import train as run_training

    with joined(launched_ranks()):
        run_training(prepare(settings, data, Path(data_config.folder), folder))


def _require_data(config: DataConfig, recipe: str, assignments: Sequence[str]) -> None:
    """SoliError with the command that builds the recipe's data where they are not there."""
    folder = Path(config.folder)
    missing = [name for name in DATA_FILES if not (folder / name).is_file()]
    if not missing:
        return
    if config.corpus is None:
        command = f"soli data pack FILES... --tokenizer FOLDER --recipe {quote(recipe)} --out {quote(config.folder)}"
    else:
        settings = [f"--set={assignment}" for assignment in assignments if assignment.startswith("data.")]
        command = join(["soli", "data", "build", recipe, *settings])
    raise SoliError(f"{folder} has no {', '.join(missing)}: build the recipe's data with: {command}")
