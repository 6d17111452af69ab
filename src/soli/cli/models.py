"""`soli models`: list the models in the Hugging Face cache; `soli models rm ID` removes one."""

from typing import Annotated, Any

import typer
from rich import box
from rich.table import Column, Table

from soli.cli._shared import options
from soli.cli._shared.confirmation import confirm
from soli.cli._shared.console import number_columns, print_json, stdout_console
from soli.errors import SoliError
from soli.hub.cache import CachedRevision, ModelId, cache_folder, list_revisions, unfinished_bytes
from soli.quantities import scaled

app = typer.Typer(help="List downloaded models and remove them.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def models(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the models as a JSON list.")] = False,
) -> None:
    """List the models in the cache of Hugging Face's libraries (HF_HUB_CACHE, HF_HOME), whoever downloaded them."""
    if ctx.invoked_subcommand is not None:
        return
    revisions = list_revisions()
    if as_json:
        print_json([_as_dict(one) for one in revisions], indent=2)
    elif not revisions:
        print(f"no models in {cache_folder()}: soli pull ID downloads one")
    else:
        table = Table("model", Column("revision", no_wrap=True), *number_columns("size"), "state", box=box.SIMPLE_HEAD)
        for one in revisions:
            table.add_row(one.repo, _revision(one), scaled(one.size, "B"), _state(one))
        stdout_console().print(table)


@app.command("rm")
def remove(
    model: Annotated[str, typer.Argument(metavar="ID", help="A model of the list; ID@REVISION for one revision.")],
    yes: options.Yes = False,
) -> None:
    """Remove a model from the cache, or one revision of it."""
    from soli.hub.pull_plan import requested_model
    from soli.hub.removal import remove_model, size_of

    requested = requested_model(model)
    if not requested.folder.is_dir():
        raise SoliError(f"{model} is not in {cache_folder()}: soli models lists what is")
    size = scaled(size_of(requested), "B")
    if not yes:
        confirm(f"remove {requested} and its {size}?")
    remove_model(requested)
    print(f"removed {requested}, {size}")


def _as_dict(one: CachedRevision) -> dict[str, Any]:
    return {
        "id": one.repo,
        "revision": one.refs[0] if one.refs else one.commit,
        "refs": one.refs,
        "commit": one.commit,
        "bytes": one.size,
        "complete": one.complete,
        "missing": one.missing,
        "folder": str(one.folder),
    }


def _revision(one: CachedRevision) -> str:
    return f"{', '.join(one.refs)} ({one.commit[:12]})" if one.refs else one.commit[:12]


def _state(one: CachedRevision) -> str:
    if one.complete:
        return "complete"
    unfinished = unfinished_bytes(ModelId(one.repo))
    partly = f", {scaled(unfinished, 'B')} of it fetched" if unfinished else ""
    return f"incomplete: {len(one.missing)} file{'s' * (len(one.missing) > 1)} missing{partly}"
