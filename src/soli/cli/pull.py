"""`soli pull ID`: download a model of the Hugging Face hub into its cache; an interrupted download resumes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from soli.cli._shared import options
from soli.cli._shared.confirmation import confirm
from soli.cli._shared.console import print_json
from soli.cli._shared.progress import ProgressBar
from soli.machine import available_memory
from soli.quantities import scaled

if TYPE_CHECKING:
    from soli.hub.pull_plan import PullPlan


def pull(
    model: Annotated[
        str, typer.Argument(metavar="ID", help="A model of the hub, such as deepseek-ai/DeepSeek-V3; or ID@REVISION.")
    ],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit; by default main.")] = None,
    yes: options.Yes = False,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Only config.json and the weight index, without a question.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Download a model: its safetensors weights, configuration, tokenizer, templates and licence, and nothing else.

    Sizes, free disk and memory are shown first. HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN are
    those of Hugging Face's own tools. The folder is printed; other verbs take the ID.
    """
    from soli.hub.download import fetch
    from soli.hub.pull_plan import check_disk, plan_pull, requested_model

    plan = plan_pull(requested_model(model, revision), config_only)
    check_disk(plan)
    if not plan.finished:
        print(_summary(plan), file=sys.stderr)
        if not config_only and not yes:
            confirm(f"download {scaled(plan.remaining_bytes, 'B')}?")
    with ProgressBar(f"downloading {plan.model.repo}", unit="bytes") as bar:
        folder = fetch(plan, bar.update)
    if json:
        size = {"bytes": plan.total_bytes, "downloaded_bytes": plan.remaining_bytes}
        print_json({"id": str(plan.model), "commit": plan.commit, "folder": str(folder), **size})
    else:
        print(folder)


def _summary(plan: PullPlan) -> str:
    """What will be downloaded, and what there is room for."""
    from soli.hub.cache import cache_folder
    from soli.hub.pull_plan import free_disk_bytes

    here = plan.total_bytes - plan.remaining_bytes
    files = f"{len(plan.files) + len(plan.weights)} files, {scaled(plan.total_bytes, 'B')}"
    lines = [
        f"{plan.model.repo} at {plan.model.revision or 'main'}, commit {plan.commit[:12]}",
        f"  files   {files}" + (f", of which {scaled(here, 'B')} are here" if here else ""),
        f"  disk    {scaled(free_disk_bytes(), 'B')} free for {cache_folder()}",
    ]
    if plan.weights:
        available, size = available_memory(), plan.weight_bytes
        fits = "" if size <= available else "; what does not fit is read from disk when it is needed"
        lines.append(f"  memory  {scaled(available, 'B')} available, weights {scaled(size, 'B')} as stored{fits}")
    return "\n".join(lines)
