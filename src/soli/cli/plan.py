"""`soli plan MODEL`: what a model takes, what of it fits in memory and how fast it will be, before it is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich import box
from rich.table import Column, Table

from soli.analysis.parameters import weights
from soli.cli._shared import options
from soli.cli._shared.console import number_columns, print_json, stdout_console
from soli.cli._shared.progress import ProgressBar
from soli.errors import SoliError
from soli.presets import PRESETS
from soli.quantities import parse_bytes, parse_flops, parse_rate, scaled

if TYPE_CHECKING:
    from soli.plan.inference import MachineRates
    from soli.plan.inference_plan import Division, PlannedModel
    from soli.plan.inference_report import PlanReport
    from soli.plan.sizes import ModelSizes

# Options of a model's plan that a training plan does not have, by parameter.
OF_A_MODEL: Final = {
    "memory": "--memory", "disk": "--disk", "memory_speed": "--memory-speed", "flops": "--flops", "format": "--format",
    "prompt": "--prompt", "skew": "--skew", "gpu": "--gpu", "gpu_speed": "--gpu-speed", "fetch": "--fetch",
    "probe": "--probe", "check": "--check",
}  # fmt: skip
SMALLEST_GPU: Final = 10**9  # bytes; less is a model's name, such as 4090
FORMATS: Final = ("bf16", "fp8", "int8", "int4")
STATED: Final = {"disk": "--disk", "memory_speed": "--memory-speed", "flops": "--flops", "format": "--format"}


def plan(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="A preset (deepseek-v3, kimi-k2, ...), a model folder, or the ID of a model of the hub."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bytes that Soli may take, as 128GB or 16GiB, the same as in soli generate; by default what this "
            "machine has available, less a margin.",
        ),
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="RATE", help="What a disk reads, as 7GB/s; by default measured here.")
    ] = None,
    memory_speed: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="Memory bandwidth of another machine, as 80GB/s; by default measured here."),
    ] = None,
    flops: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="Products of another machine, as 2TFLOPS; with --memory-speed 15 per byte."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="bf16, fp8, int8 or int4; by default the format of the files.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="Tokens of the prompt; by default 512, or what fits.")
    ] = None,
    skew: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=4,
            help="How unevenly experts are chosen: the one of rank r as often as 1/r^SKEW; 0 is evenly. By default as "
            "in earlier runs of the model, evenly where there were none.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Also show what all but the experts on a GPU of so much memory brings: other programs do that, Soli "
            "does not.",
        ),
    ] = None,
    gpu_speed: Annotated[str, typer.Option(metavar="RATE", help="That GPU's memory bandwidth.")] = "900GB/s",
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Fetch config.json and the index of a model that is not here.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure this machine again; its rates are remembered in the cache folder.")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Run the model in this folder, and print prediction and measurement."),
    ] = None,
    train: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Plan a training run, as soli train RECIPE --dry-run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tables.")] = False,
    threads: options.Threads = None,
) -> None:
    """Predict sizes and speed of a model whose experts are partly read from disk. No weights are read or downloaded.

    Another machine: soli plan deepseek-v3 --memory 128GB --disk 7GB/s --memory-speed 80GB/s
    """
    options.use_threads(threads)
    if train is not None:
        if model is not None:
            raise SoliError(f"{model} with --train: the model of a training plan is the recipe's; leave it out")
        named = [option for name, option in OF_A_MODEL.items() if options.is_on_command_line(ctx, name)]
        if named:
            raise SoliError(f"{' and '.join(named)} with --train: a training plan has no such option; leave it out")
        _plan_training(train, as_json)
        return
    if check is not None:
        named = [option for name, option in STATED.items() if options.is_on_command_line(ctx, name)]
        if named:
            raise SoliError(f"{' and '.join(named)} with --check: the run is measured on this machine; leave it out")
    name = model or check
    if name is None:
        raise SoliError("there is nothing to plan: give a preset, a folder or an ID, or --train with a recipe")
    request = _Request(
        memory=options.memory_bytes(memory),
        disk_rate=None if disk is None else parse_rate(disk, "--disk"),
        memory_rate=None if memory_speed is None else parse_rate(memory_speed, "--memory-speed"),
        flop_rate=None if flops is None else parse_flops(flops, "--flops"),
        gpu=None if gpu is None else _gpu_bytes(gpu),
        gpu_rate=parse_rate(gpu_speed, "--gpu-speed"),
        format=format,
        prompt=prompt,
        skew=skew,
        renew=probe or check is not None,  # before and after the run: what is beside it slows both
    )
    if fetch:
        _fetch(name)
    with ProgressBar("planning", unit="steps") as bar:
        report = _plan_model(name, request, check, bar.rename)
    if as_json:
        print_json(report.as_dict(), indent=2)
    else:
        _print(report)


@dataclass(frozen=True)
class _Request:
    """The options of a model's plan, read; None for what is measured here."""

    memory: int | None
    disk_rate: float | None
    memory_rate: float | None
    flop_rate: float | None
    gpu: int | None
    gpu_rate: float
    format: str | None
    prompt: int | None
    skew: float | None
    renew: bool


def _gpu_bytes(size: str) -> int:
    parsed = parse_bytes(size, "--gpu")
    if parsed < SMALLEST_GPU:
        raise SoliError(f"--gpu is {size[:40]!r}: give the bytes of its memory, such as 24GB")
    return parsed


def _plan_training(recipe: str, as_json: bool) -> None:
    from soli.cli._shared.training_plan import print_training_plan
    from soli.data.recipe import find_recipe, load_recipe
    from soli.recipes import read_data_config
    from soli.train.settings import read_settings

    table = load_recipe(find_recipe(recipe), [])
    settings = read_settings(table)
    read_data_config(table)
    print_training_plan(settings, table.get("data", {}), as_json=as_json)


def _fetch(name: str) -> None:
    """config.json and the index of a model of the hub, into its cache."""
    from soli.hub.download import fetch_config

    if name not in PRESETS and not Path(name).exists():
        fetch_config(name)


def _plan_model(name: str, request: _Request, check: str | None, on_step: Callable[[str], None]) -> PlanReport:
    from soli.plan.inference import MAX_RANKS, TYPICAL_SKEW, mean_rates
    from soli.plan.inference_plan import (
        PlannedWorkload,
        gpu_split,
        memories_to_compare,
        speed,
        table_of_formats,
        upgrades,
    )
    from soli.plan.inference_report import PlanReport

    model, sizes, division, prompt = _divided(name, request, check)
    memory = division.memory
    sources = {"memory": "stated" if request.memory is not None else "available here, less a margin"}
    machine, rate_sources = _rates(model, request, on_step)
    memories = memories_to_compare(sizes, memory)
    measurement = None
    usage = model.usage() if request.skew is None else None
    if check is not None:
        from soli.plan.check import measure

        measurement, chosen_before = measure(check, memory, prompt, on_step)
        usage = chosen_before if request.skew is None else None
        machine = mean_rates(machine, _rates(model, request, on_step)[0])
    workload = PlannedWorkload(prompt, request.skew or 0.0, usage)
    is_known = usage is not None or request.skew is not None or model.config.n_routed_experts > MAX_RANKS
    return PlanReport(
        model=model,
        sizes=sizes,
        division=division,
        speed=speed(sizes, division, machine, workload),
        machine=machine,
        sources=sources | rate_sources,
        prompt=prompt,
        skew=workload.skew,
        memories=memories,
        formats=table_of_formats(model, machine, memories, workload),
        upgrades=upgrades(sizes, memory, machine, workload),
        gpu=None if request.gpu is None else gpu_split(sizes, memory, machine, request.gpu, request.gpu_rate, prompt),
        check=measurement,
        routing_tokens=None if usage is None else usage.tokens,
        typical=None if is_known else speed(sizes, division, machine, PlannedWorkload(prompt, TYPICAL_SKEW)),
    )


def _divided(name: str, request: _Request, check: str | None) -> tuple[PlannedModel, ModelSizes, Division, int]:
    """The model, its sizes, how memory is divided, and the tokens of the prompt. SoliError for what cannot be
    planned, or not be checked."""
    from soli.experts.budget import default_memory
    from soli.plan.inference_plan import ANSWER, PROMPT, divide, find_model

    model = find_model(name)
    if check is not None and check != name and find_model(check).config != model.config:
        raise SoliError(f"{name} is not the model in {check}: leave one of them out")
    model = model if check is None else find_model(check)
    if request.format is not None and request.format not in FORMATS:
        raise SoliError(f"--format is {request.format!r}: choose {', '.join(FORMATS)}")
    sizes = model.sizes(request.format)
    memory = default_memory()[0] if request.memory is None else request.memory
    positions = model.config.max_position_embeddings
    if request.prompt is not None and request.prompt >= positions:
        raise SoliError(f"--prompt is {request.prompt:,}, but {name} has {positions:,} positions for it and an answer")
    prompt = request.prompt or min(PROMPT, max(1, positions - ANSWER))
    division = divide(sizes, memory, prompt + ANSWER)
    if check is not None and not division.fits:
        raise SoliError(
            f"{check} needs {scaled(division.needed, 'B')}, but --check may take {scaled(memory, 'B')}: "
            "give more, or plan it without a check"
        )
    return model, sizes, division, prompt


def _rates(
    model: PlannedModel, request: _Request, on_step: Callable[[str], None]
) -> tuple[MachineRates, dict[str, str]]:
    """The machine, and where each figure of it is from."""
    from soli.experts.disk import measured_disk
    from soli.plan.inference import FLOPS_PER_BYTE, stated_machine
    from soli.plan.probe import measured_compute

    disk_rate, latency, disk_source = request.disk_rate, None, "stated"
    if disk_rate is None:
        on_step("measuring the disk")
        disk = measured_disk(model.place, request.renew)
        disk_rate, latency, disk_source = disk.rate, disk.idle_latency, f"measured {disk.date}"
    if request.memory_rate is not None:
        machine = stated_machine(request.memory_rate, disk_rate, request.flop_rate)
        memory_source = "stated"
        flop_source = "stated" if request.flop_rate else f"assumed, {FLOPS_PER_BYTE:g} per byte of memory bandwidth"
    else:
        on_step("measuring memory and kernels")
        compute = measured_compute(request.renew)
        machine = compute.rates(disk_rate)
        memory_source = flop_source = f"measured {compute.date}"
        if request.flop_rate is not None:
            machine = replace(machine, flop_rates=dict.fromkeys(machine.flop_rates, request.flop_rate))
            flop_source = "stated"
    if latency is not None:
        machine = replace(machine, disk_latency=latency)
    return machine, {"memory_rate": memory_source, "disk_rate": disk_source, "flop_rates": flop_source}


def _print(report: PlanReport) -> None:
    console = stdout_console()
    count = sum(group.total for group in weights(report.model.config))
    sizes = report.sizes
    title = f"{report.model.name}: {scaled(count)} parameters, {scaled(sizes.total_bytes, 'B')} in {sizes.format}"
    if (published := report.model.index_bytes) is not None:
        title += f"; {scaled(published, 'B')} in the files by their index"
    console.print(title, style="bold", soft_wrap=True, markup=False)
    console.print(_parts(sizes))
    for label, text in report.lines() + (report.check_lines() if report.check else []):
        console.print(f"[bold]{label:<12}[/bold]", end="")
        console.print(text, markup=False, soft_wrap=True)
    console.print()
    console.print("predicted tokens/s while decoding, by format and memory", style="bold")
    console.print(_formats(report))


def _parts(sizes: ModelSizes) -> Table:
    table = Table(Column("", "in all"), "format", box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    table.columns[1].footer = ""
    read = sum(part.bytes_per_token for part in sizes.parts)
    for title, total in (("size", sizes.total_bytes), ("read per token", read)):
        table.add_column(title, scaled(total, "B"), justify="right", no_wrap=True)
    for part in sizes.parts:
        table.add_row(part.name, part.format, scaled(part.bytes, "B"), scaled(part.bytes_per_token, "B"))
    if sizes.mtp_bytes:
        table.add_row("MTP, not loaded", "", scaled(sizes.mtp_bytes, "B"), "")
    return table


def _formats(report: PlanReport) -> Table:
    from soli.plan.inference_report import number

    titles = [scaled(memory, "B") for memory in report.memories]
    table = Table(Column(""), *number_columns("size", *titles, no_wrap=True), box=box.SIMPLE_HEAD, pad_edge=False)
    for name, (sizes, speeds) in report.formats.items():
        label = f"{name}, {sizes.format}" if name.startswith("as ") else name
        cells = ["-" if speed is None else number(speed.decode.tokens_per_second) for speed in speeds]
        table.add_row(label, scaled(sizes.total_bytes, "B"), *cells)
    return table
