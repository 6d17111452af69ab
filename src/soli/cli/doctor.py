"""`soli doctor`: what this machine has, which kernels run on it, and how fast it reads memory and disk."""

from pathlib import Path
from typing import Annotated

import typer

from soli.cli._shared import options
from soli.cli._shared.console import print_json, stdout_console
from soli.errors import SoliError


def doctor(
    disk: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Measure the disk under this folder.")] = None,
    threads: options.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Show processor, kernels, threads, memory and disk bandwidth, GPUs and versions; takes a few seconds."""
    if disk is not None and not disk.is_dir():
        raise SoliError(f"{disk}: there is no such folder to measure a disk in")
    from soli.plan.machine_report import report_machine

    options.use_threads(threads)
    report = report_machine(disk)
    if as_json:
        print_json(report, indent=2)
        return
    console = stdout_console()
    for label, text in report.lines():
        console.print(f"[bold]{label:<12}[/bold]", end="")
        console.print(text, markup=False, soft_wrap=True)
