"""What `soli train --dry-run` prints: the plan of a run as tables and lines."""

from __future__ import annotations

from typing import Any

from soli.train.plan import Plan


def print_plan(plan: Plan, devices: int, mfu: float, device_tflops: float) -> None:
    """Phases, parameters, FLOPs, memory and GPU-hours, on standard output."""
    from rich import box
    from rich.table import Table

    from soli.cli.console import stdout_console
    from soli.cli.count import scaled

    console = stdout_console()
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    total = sum(phase.tokens for phase in plan.phases)
    table.add_column("phase", "total", no_wrap=True, min_width=len("extension 2"))
    steps = sum(phase.steps for phase in plan.phases)
    for title, footer in (
        ("tokens", f"{total:,}"),
        ("steps", f"{steps:,}"),
        ("length", ""),
        ("batch", ""),
        ("rate", ""),
    ):
        table.add_column(title, footer, justify="right", no_wrap=True)
    for phase in plan.phases:
        batch, rate = _span(phase.batch_sequences, ","), _span(phase.learning_rate, ".2e")
        table.add_row(phase.name, f"{phase.tokens:,}", f"{phase.steps:,}", f"{phase.sequence_length:,}", batch, rate)
    console.print(table)
    parts = ", ".join(f"{name} {scaled(size, 'B')}" for name, size in plan.state_bytes.items())
    whole = scaled(sum(plan.state_bytes.values()), "B")
    share = "on one device" if devices == 1 else f"on each of {devices:,} devices"
    lines = [
        ("parameters", f"{scaled(plan.parameters)} with MTP modules, {scaled(plan.activated)} activated per token"),
        ("FLOPs", f"{plan.flops:.3g} in all: three forward passes per token"),
        ("memory", f"{whole} {share}, activations not counted: {parts}"),
        ("GPU-hours", f"{plan.gpu_hours:,.1f} at {100 * mfu:g} % of {device_tflops:g} TFLOP/s"),
    ]
    if devices > 1:
        lines.append(("days", f"{plan.gpu_hours / devices / 24:,.1f} on {devices:,} devices"))
    if plan.paper_gpu_hours:
        lines.append(
            ("the paper's", f"{plan.paper_gpu_hours:,} H800-hours without extension (arXiv 2412.19437, table 1)")
        )
    for label, text in lines:
        console.print(f"[bold]{label:<12}[/bold]{text}", soft_wrap=True)


def _span(ends: tuple[Any, Any], form: str) -> str:
    first, last = (format(end, form) for end in ends)
    return first if first == last else f"{first} -> {last}"
