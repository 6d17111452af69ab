"""`soli doctor`: what this machine has, which kernels run on it, and how fast it reads memory and disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soli.cli._shared.console import print_json, stdout_console
from soli.errors import SoliError

if TYPE_CHECKING:
    from soli.plan.machine_report import MachineReport


def doctor(
    disk: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Measure the disk under this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Show processor, kernels, threads, memory and disk bandwidth, GPUs and versions; takes a few seconds."""
    if disk is not None and not disk.is_dir():
        raise SoliError(f"{disk}: there is no such folder to measure a disk in")
    from soli.plan.machine_report import report_machine

    report = report_machine(disk)
    if as_json:
        print_json(report, indent=2)
        return
    console = stdout_console()
    for label, text in _lines(report):
        console.print(f"[bold]{label:<12}[/bold]", end="")
        console.print(text, markup=False, soft_wrap=True)


def _lines(report: MachineReport) -> list[tuple[str, str]]:
    cpp = report.kernels not in ("torch", "reference")
    kernels = (
        f"C++ for {report.kernels}, {report.kernels_note}" if cpp else f"{report.kernels}: {report.kernels_note}"
    )
    disk = report.disk_gb_per_second
    speed = f"{disk:.2f} GB/s" if disk is not None else "not measured: no space for a file, or not allowed"
    return [
        ("processor", f"{report.processor}, {report.cores} cores, {report.memory_bytes / 2**30:.1f} GiB of memory"),
        ("features", " ".join(report.features) or "none that the kernels use"),
        ("kernels", kernels),
        ("threads", f"{report.threads}, {' and '.join(report.openmp) or 'no OpenMP library'}"),
        ("memory", f"{report.memory_gb_per_second:.1f} GB/s read by all threads"),
        ("disk", f"{speed}, reading in {report.disk_folder}"),
        ("GPU", "; ".join(report.gpus) or "none that PyTorch sees"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
