"""`soli train RECIPE`: train a model from a recipe; run again with the same --out and it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, such as nano-zh-en, or its folder or TOML file.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one value of the recipe.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/RECIPE. A whole checkpoint in it is resumed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe as JSON, and stop.")] = False,
) -> None:
    """Train a model from a recipe; a stopped run resumes."""
    from soli.data.recipe import data_folder, find_recipe, load_recipe
    from soli.train.settings import as_recipe, read_settings

    path = find_recipe(recipe)
    table = load_recipe(path, list(assignments or []))
    settings, data = read_settings(table), table.get("data", {})
    if dry_run:
        import json

        print(json.dumps(as_recipe(settings, data), indent=2, ensure_ascii=False))
        return
    from soli.train.loop import train as run_training
    from soli.train.setup import prepare

    run_training(prepare(settings, data, data_folder(table), out or Path("runs") / path.parent.name))
