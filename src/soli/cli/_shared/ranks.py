"""One model on several processes, for the verbs that compute with one: started here, or by torchrun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from soli.cli._shared import options
from soli.errors import SoliError

ARGUMENTS = "soli.arguments"  # of the whole command, in the context's `meta`


def started_ranks(ctx: typer.Context, model: str, processes: int | None) -> bool:
    """Whether --processes asks for several, which have then run this command together, to its end. SoliError for a
    model that they cannot share."""
    if processes is None or processes == 1:
        return False
    from soli.parallel.ranks import launched_ranks

    if launched_ranks().world > 1:
        raise SoliError("--processes starts the processes itself; leave it out under torchrun")
    from soli.checkpoint import open_checkpoint
    from soli.parallel.launch import run_together
    from soli.parallel.model_part import ModelPart

    ModelPart(open_checkpoint(model).config, 0, processes)
    status = run_together(without_processes(ctx.meta[ARGUMENTS]), processes)
    if status:
        raise typer.Exit(status)
    return True


def join_first_rank(
    model: str,
    device: str,
    dtype: str,
    mtp: bool = False,
    memory: str | None = None,
    threads: int | None = None,
) -> None:
    """On every rank but the first: compute with it until it ends, and end this process. Elsewhere nothing."""
    from soli.parallel.ranks import launched_ranks

    if launched_ranks().is_first:
        return
    from soli.engine.text_model import open_text_model

    options.use_threads(threads)
    open_text_model(model, device, dtype, mtp, memory=options.memory_bytes(memory))


def without_processes(arguments: Sequence[Any]) -> list[str]:
    """The arguments of a command without --processes."""
    remaining: list[str] = []
    rest = iter(map(str, arguments))
    for argument in rest:
        if argument == "--":
            remaining += [argument, *rest]
        elif argument == "--processes":
            next(rest, None)
        elif not argument.startswith("--processes="):
            remaining.append(argument)
    return remaining
