"""`soli data build RECIPE` makes a recipe's corpus and tokens from public packages, `soli data pack` tokens from a
person's own files; `soli data inspect` shows either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from soli.cli.data_pack import pack

app = typer.Typer(help="Build, pack and inspect corpora.", no_args_is_help=True, rich_markup_mode=None)
app.command()(pack)


@app.command()
def build(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, such as nano-zh-en, or its folder or TOML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default the recipe's data.folder.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for downloads and read sources; default OUT/cache.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Build without the sources that cannot be fetched.")
    ] = False,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one value of the recipe.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts and tokens as JSON.")] = False,
) -> None:
    """Fetch the recipe's packages, clean and split their text, learn a tokenizer, pack tokens.

    Stopped, it goes on where it was when run again.
    """
    from soli.cli._shared.data_tables import Progress, print_counts
    from soli.data.recipe import DataConfig, load_recipe
    from soli.recipes.nano_corpus.build import build_data

    config = DataConfig.from_recipe(load_recipe(recipe, assignments or []))
    folder = out or Path(config.folder)
    with Progress(quiet=as_json) as progress:
        build_data(config, folder, cache or folder / "cache", progress.report, allow_missing)
    print_counts(folder, as_json)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that soli data build or pack wrote.")],
    samples: Annotated[int, typer.Option(min=0, help="Documents to show as text.")] = 6,
    seed: Annotated[int, typer.Option(help="Another seed, other documents.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Tokens by source, characters per token, lengths of documents, and a few documents as they are trained on."""
    from soli.cli._shared.data_tables import print_inspection
    from soli.data.inspection import inspect_folder

    found = inspect_folder(folder, samples, seed)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_inspection(folder, found)
