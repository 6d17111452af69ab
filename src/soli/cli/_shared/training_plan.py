"""What a training run needs, as `soli train RECIPE --dry-run` and `soli plan --train RECIPE` print it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.table import Column, Table

from soli.cli._shared.console import print_json, stdout_console
from soli.parallel.stages import find_schedule
from soli.plan.devices import DeviceKind, find_device
from soli.plan.memory import describe_fit
from soli.plan.mesh import MARGIN, MeshPlan, papers_plan, plan_mesh, pretraining_flops
from soli.plan.mesh_proposal import Proposal, propose_mesh
from soli.plan.mesh_sizes import MeshSizes
from soli.plan.schedule_plot import save_schedule_plot
from soli.plan.training import STEP_SHARE, TrainingPlan, hours_here, plan_run
from soli.quantities import scaled
from soli.train.settings import TrainSettings, as_recipe

if TYPE_CHECKING:
    from soli.plan.throughput import MeasuredDevice

Lines = list[tuple[str, str]]

MFU: Final = 0.4


def print_training_plan(
    settings: TrainSettings,
    data: dict[str, Any],
    devices: int = 1,
    mfu: float = MFU,
    device_tflops: float | None = None,
    measure: bool = True,
    as_json: bool = False,
    plot: Path | None = None,
    device: str = "h800",
) -> None:
    """What a run needs, for `devices` equal devices; with `plot`, draw its schedules into that file.

    `device` names what several devices are; `device_tflops` is their peak if it is another than that one's.
    """
    device_kind = find_device(device)
    device_tflops = device_tflops or device_kind.tflops
    here = None
    if measure:
        from soli.plan.throughput import measure_device

        here = measure_device(settings)
    precision = here.computes if here else None
    kind = here.kind if here else "cpu" if settings.run.device == "cpu" else "cuda"
    plan = plan_run(settings, devices, mfu, device_tflops, precision, kind)
    mesh: MeshPlan | None = None
    proposal: Proposal | None = None
    plans_mesh = devices > 1 and not settings.losses.mtp_alone  # a mesh is timed as one that trains every parameter
    if plans_mesh and devices == settings.parallel.world:
        own = settings.parallel
        schedule = find_schedule(own.schedule).name
        sizes = MeshSizes(own.data, own.expert, own.pipeline, own.replicate, own.keep_gathered, schedule)
        mesh = plan_mesh(settings, sizes, device_kind, plan.precision, pretraining_flops(settings))
    elif plans_mesh:
        proposal = propose_mesh(settings, devices, device_kind, plan.precision)
        mesh = None if proposal is None else proposal.plan
    if plot is not None:
        save_schedule_plot(plot, settings)
    if as_json:
        document: dict[str, Any] = {"plan": plan, "recipe": as_recipe(settings, data)}
        if devices > 1:
            document["mesh"] = mesh
        if proposal is not None:
            document["proposal"] = {
                "changes": proposal.changes, "refusals": proposal.refusals, "memory_of_stages": proposal.stages
            }  # fmt: skip
        if here is not None:
            hours = hours_here(settings, plan.flops, here.tflops, here.precision)
            document["device"] = {**vars(here), "hours": hours}
        print_json(document, indent=2)
        return
    console = stdout_console()
    console.print(_phases(plan))
    lines = _constants(settings, data.get("fim_rate", 0.0)) + _memory(plan, settings, devices, here)
    if plans_mesh:
        lines += _mesh(mesh, proposal, devices, device_kind)
    elif devices > 1:
        lines.append(("mesh", "none is planned where the MTP modules are trained alone: set the sizes in [parallel]"))
    if proposal is not None and settings.parallel.world > 1:
        lines.append(("", f"the recipe's own [parallel] is for {settings.parallel.world:,} devices"))
    if mesh is not None:
        lines += _causes(mesh, settings, plan)
    if mesh is not None and mesh.precision == "bf16" and device_kind.fp8_tflops:
        trained = settings if proposal is None else proposal.settings
        in_fp8 = plan_mesh(trained, mesh.sizes, device_kind, "fp8", pretraining_flops(settings))
        lines.append(("", f"{in_fp8.expected_gpu_hours:,.0f} GPU-hours expected with --set run.precision=fp8"))
    for label, text in lines + _time(plan, settings, devices, mfu, device_tflops, here):
        console.print(f"[bold]{label:<12}[/bold]{text}", soft_wrap=True)


def _phases(plan: TrainingPlan) -> Table:
    tokens, steps = sum(phase.tokens for phase in plan.phases), sum(phase.steps for phase in plan.phases)
    totals = {"tokens": f"{tokens:,}", "steps": f"{steps:,}", "length": "", "batch": "", "rate": ""}
    columns = [Column(title, footer, justify="right", no_wrap=True) for title, footer in totals.items()]
    name = Column("phase", "total", no_wrap=True, min_width=len("extension 2"))
    table = Table(name, *columns, box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    for phase in plan.phases:
        batch, rate = _span(phase.batch_sequences, ","), _span(phase.learning_rate, ".2e")
        table.add_row(phase.name, f"{phase.tokens:,}", f"{phase.steps:,}", f"{phase.sequence_length:,}", batch, rate)
    return table


def _constants(settings: TrainSettings, fim_rate: float) -> Lines:
    """What the recipe sets besides its phases: optimizer, ramp, balance, MTP, data, YaRN."""
    optimizer, schedule, balance, losses = settings.optimizer, settings.schedule, settings.balance, settings.losses
    adamw = f"betas {optimizer.beta1:g} / {optimizer.beta2:g}, eps {optimizer.eps:g}"
    name = f"Muon for matrices, momentum {optimizer.momentum:g}; AdamW for the rest" if optimizer.name == "muon" else ""
    decay = f"decay {optimizer.weight_decay:g} but for norms and biases, clip {optimizer.clip:g}"
    lines = [("optimizer", f"{name or 'AdamW'}, {adamw}, {decay}, moments {optimizer.moments}")]
    if optimizer.router_rate != 1:
        lines.append(("routers", f"at {optimizer.router_rate:g} of the learning rate"))
    lines.append(("start", f"normal, deviation {settings.model.initializer_range:g}"))
    if schedule.batch_sequences_start is not None:
        ramp = f"{schedule.batch_sequences_start:,} -> {schedule.batch_sequences:,} sequences"
        lines.append(("batch ramp", f"{ramp} over {schedule.batch_ramp_tokens:,} tokens"))
    end = "" if balance.gamma_tokens is None else f" until {balance.gamma_tokens:,} tokens, then 0"
    late = losses.mtp_late_after_tokens
    then = "" if late is None else f" until {late:,} tokens, then {losses.mtp_weight_late:g}"
    alone = ", alone" if losses.mtp_alone else ""
    start = f"from {losses.mtp_from_tokens:,} tokens on, " if losses.mtp_from_tokens else ""
    depth = settings.model.num_nextn_predict_layers
    lines += [
        ("balance", f"gamma {balance.gamma:g}{end}; alpha {balance.alpha:g}"),
        ("MTP", f"depth {depth}{alone}, {start}lambda {losses.mtp_weight:g}{then}" if depth else "none"),
        ("data", f"fill-in-the-middle rate {fim_rate:g}"),
    ]
    for number, phase in enumerate(settings.extension, 1):
        if (yarn := phase.rope_scaling) is not None:
            ramp = f"beta {yarn.beta_fast:g} / {yarn.beta_slow:g}, mscale {yarn.mscale:g} / {yarn.mscale_all_dim:g}"
            text = f"factor {yarn.factor:g} of {yarn.original_max_position_embeddings:,}, {ramp}"
            lines.append((f"YaRN {number}", text))
    return lines


def _memory(plan: TrainingPlan, settings: TrainSettings, devices: int, here: MeasuredDevice | None) -> Lines:
    run = settings.run
    parts = f"{scaled(plan.parameters)} with MTP modules, {scaled(plan.activated)} activated per token"
    share = "on one device" if devices == 1 else f"on each of {devices:,} devices without the mesh below"
    sizes = {
        "weights": plan.memory.weights,
        "gradients": plan.memory.gradients,
        "moments": plan.memory.moments,
        f"{plan.precision} copies": plan.memory.copies,
        "activations": plan.memory.activations,
        "largest operation": plan.memory.transient,
    }
    by_kind = ", ".join(f"{name} {scaled(size, 'B')}" for name, size in sizes.items() if size)
    micro = f"micro-batch of {run.micro_sequences} x {settings.schedule.sequence_length:,} tokens in {plan.precision}"
    recomputed = ", activations recomputed" if run.activation_checkpointing else ""
    passes = "three forward passes per token"
    if settings.losses.mtp_alone:
        passes = "a forward pass per token, and three of the MTP modules"
    lines = [
        ("parameters", parts),
        ("FLOPs", f"{plan.flops:.3g} in all: {passes}"),
        ("memory", f"{scaled(plan.memory.total, 'B')} {share}, {micro}{recomputed}"),
        ("", by_kind),
    ]
    for number, memory in enumerate(plan.extension_memory, 1):
        sizes_each = f"{scaled(memory.total, 'B')} on each, activations {scaled(memory.activations, 'B')}"
        lines.append((f"extension {number}", sizes_each))
    if here is not None:
        verdict = describe_fit(settings, plan.precision, here.kind, devices, here.memory)
        lines.append(("memory here", f"{scaled(here.memory, 'B')}: {verdict}"))
    return lines


def _mesh(mesh: MeshPlan | None, proposal: Proposal | None, devices: int, device: DeviceKind) -> Lines:
    """How `devices` share the run, what each holds and sends."""
    if mesh is None:
        return [("mesh", f"no sizes of {devices:,} devices can share the recipe's batch; change --devices")]
    options = ", activations recomputed" if mesh.recomputes else ""
    memory = ", ".join(f"{name} {scaled(size, 'B')}" for name, size in mesh.memory.items())
    traffic = ", ".join(f"{name} {scaled(size, 'B')}" for name, size in mesh.traffic.items())
    slow, fast = mesh.seconds
    return [
        ("mesh", f"{mesh.sizes}{options}"),
        *([] if proposal is None else _changes(proposal, devices)),
        ("on each", f"{scaled(mesh.total, 'B')}, which {_fits(mesh.total, device)}: {memory}"),
        *([] if proposal is None else _stages(proposal, device)),
        ("sends", f"{traffic or 'nothing'} in a step"),
        ("bubble", f"{100 * mesh.bubble:.1f} % of a step"),
        ("a step", f"{mesh.expected_seconds:,.3g} s expected; {fast:,.3g} s with each kernel at its own rate, "
         f"{slow:,.3g} s with no communication hidden"),
        ("MFU", f"{100 * mesh.expected_mfu:.0f} % expected, {100 * mesh.mfu[0]:.0f} to {100 * mesh.mfu[1]:.0f} %: "
         f"{mesh.expected_gpu_hours:,.0f} GPU-hours of pretraining, {_hours(mesh)}"),
    ]  # fmt: skip


def _changes(proposal: Proposal, devices: int) -> Lines:
    """The options with which the trainer accepts the mesh, and why the recipe's own batches are not among them."""
    changes = " ".join(f"--set {field}={_toml(value)}" for field, value in proposal.changes.items())
    lines = [("", f"soli train accepts it for every phase with {changes}")]
    if proposal.refusals:
        meshes = f"no mesh of {devices:,} devices{' that fits' if proposal.plan.fits else ''}"
        lines.append(("batches", f"{meshes} takes the recipe's in all phases. This one:"))
        lines += [("", reason) for reason in proposal.refusals]
    return lines


def _stages(proposal: Proposal, device: DeviceKind) -> Lines:
    """Memory of each extension phase on the mesh."""
    lines = []
    for number, size in enumerate(proposal.stages[1:], 1):
        length = proposal.settings.extension[number - 1].sequence_length
        fit = _fits(size, device)
        fit += "" if size <= MARGIN * device.memory else f": each device has a whole sequence of {length:,} tokens"
        lines.append(("", f"{scaled(size, 'B')} in extension phase {number}, which {fit}"))
    return lines


def _causes(mesh: MeshPlan, settings: TrainSettings, plan: TrainingPlan) -> Lines:
    """What the expected GPU-hours are spent on, and how many of them the paper's choices save."""
    spent = ", ".join(f"{name} {scaled(hours)}" for name, hours in mesh.hours_by_cause.items())
    lines = [("", f"of these: {spent}")]
    if plan.paper_gpu_hours:
        papers = papers_plan(settings).hours_by_cause
        reasons = {
            "arithmetic": f"{mesh.precision} instead of FP8", "recomputing": "whole blocks recomputed",
            "uneven stages": "stages of unequal work", "bubble": "a schedule that waits longer",
            "tokens to experts": "all-to-all that no computation hides", "other messages": "other messages not hidden",
        }  # fmt: skip
        costs = {reason: mesh.hours_by_cause.get(name, 0) - papers.get(name, 0) for name, reason in reasons.items()}
        least = 0.01 * plan.paper_gpu_hours
        more = [f"{scaled(hours)} for {reason}" for reason, hours in costs.items() if hours > least]
        if more:
            lines.append(("", f"more than the paper's choices: {', '.join(more)}"))
    return lines


def _fits(size: int, device: DeviceKind) -> str:
    return f"{'fits' if size <= MARGIN * device.memory else 'does not fit'} a device {device.name}"


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hours(mesh: MeshPlan) -> str:
    slow, fast = mesh.gpu_hours
    return f"{fast:,.0f} to {slow:,.0f}"


def _time(
    plan: TrainingPlan,
    settings: TrainSettings,
    devices: int,
    mfu: float,
    device_tflops: float,
    here: MeasuredDevice | None,
) -> Lines:
    lines: Lines = []
    if here is not None:
        hours = hours_here(settings, plan.flops, here.tflops, here.precision)
        peak = f" of {here.peak_tflops:g} stated" if here.peak_tflops else ""
        measured = f"{here.title}: {here.tflops:.3g} TFLOP/s{peak} measured on products in {here.precision}"
        lines += [
            ("this device", f"{measured}, about {hours:,.1f} hours at {100 * STEP_SHARE[here.precision]:g} %"),
            ("", "of that rate, the share that a step of nano-zh-en reaches on one CPU core"),
        ]
    lines.append(("GPU-hours", f"{plan.gpu_hours:,.1f} at {100 * mfu:g} % of {device_tflops:g} TFLOP/s"))
    if devices > 1:
        lines.append(("days", f"{plan.gpu_hours / devices / 24:,.1f} on {devices:,} devices"))
    if plan.paper_gpu_hours:
        measured = f"{plan.paper_gpu_hours:,} H800-hours without extension (arXiv 2412.19437, table 1);"
        planned = f"{papers_plan(settings).expected_gpu_hours:,.0f} planned for its choices: pipeline 16, expert 64, "
        choices = "FP8, DualPipe, norms and up-projections recomputed instead of blocks"
        lines += [("the paper's", measured), ("", planned + choices)]
    return lines


def _span(values: tuple[Any, Any], form: str) -> str:
    first, last = (format(value, form) for value in values)
    return first if first == last else f"{first} -> {last}"
