"""`soli data pack INPUT...`: a person's own texts into the folder of packed tokens that `soli train` reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from soli.data.pack import Input


def pack(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT[=WEIGHT]...",
            help="Files (.jsonl, .txt, .tsv, .parquet), folders of one kind of them, or saved `datasets` folders.",
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="A folder with tokenizer.json, or nano: the model in the box.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not be there yet.")],
    field: Annotated[
        str, typer.Option(help="The field or column with the text; a number, from 1, in TSV without names.")
    ] = "text",
    pair: Annotated[
        str | None, typer.Option(metavar="ENGLISH,CHINESE", help="The two fields of translations, in this order.")
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Plain text: each line is a document, not each file.")] = False,
    form: Annotated[
        str | None, typer.Option("--format", help="jsonl, text, tsv, parquet or datasets, whatever files are called.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Take fim_rate, heldout_every, longest_document and seed from this recipe's [data]."),
    ] = None,
    heldout_every: Annotated[
        int | None, typer.Option(help="One document in so many is held out, by a hash of it; default 200.")
    ] = None,
    fim_rate: Annotated[
        float | None, typer.Option(help="Share of documents rearranged as prefix, suffix, middle; default 0.")
    ] = None,
    longest: Annotated[
        int | None, typer.Option(metavar="CHARACTERS", help="Cut longer documents where a paragraph or line ends.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draws copies, their order, and gaps to fill; default 1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Pack your own texts for training, as `soli data build` packs a recipe's.

    A weight is how many copies of each document an epoch holds on average: `notes.jsonl=2.5`. Lines that cannot be used
    are counted, told with file and number, and listed in OUT/bad_lines.jsonl. Options given here win over the recipe.
    """
    from soli.cli._shared.data_tables import Progress, print_packed
    from soli.data.pack import PackConfig, pack_inputs
    from soli.data.readers import Layout

    fields = _two_fields(pair) if pair is not None else (field,)
    given = {"heldout_every": heldout_every, "fim_rate": fim_rate, "longest_document": longest, "seed": seed}
    chosen = {name: value for name, value in given.items() if value is not None}
    config = PackConfig(
        inputs=tuple(map(parse_input, inputs)),
        layout=Layout(fields, lines, form),
        **{**(recipe_fields(recipe, given) if recipe else {}), **chosen},
    )
    with Progress(quiet=as_json) as progress:
        found = pack_inputs(config, tokenizer_folder(tokenizer), out, progress.report, _tell)
    if as_json:
        print(json.dumps({"folder": str(out), **found}, indent=2))
    else:
        print_packed(out, found)


def parse_input(written: str) -> Input:
    """`PATH` or `PATH=WEIGHT`; a path that is there is taken as it stands, with whatever = it has in its name."""
    from soli.data.pack import Input

    path, equals, weight = written.rpartition("=")
    if not equals or Path(written).exists():
        return Input(Path(written))
    try:
        return Input(Path(path), float(weight))
    except ValueError:
        raise typer.BadParameter(f"{written}: {weight!r} is not a weight; write PATH=2.5") from None


def recipe_fields(recipe: str, names: Iterable[str]) -> dict[str, Any]:
    """Those of `names` that the recipe's [data] section gives, checked as `soli data build` checks them."""
    from soli.data.recipe import DataConfig, load_recipe

    table = load_recipe(recipe)
    section = DataConfig.from_recipe(table)
    return {name: getattr(section, name) for name in names if name in table.get("data", {})}


def tokenizer_folder(name: str) -> Path:
    """The folder of the model in the box for `nano`, else the folder of that name."""
    return Path(__file__).resolve().parents[1] / "models" / "nano" if name == "nano" else Path(name)


def _two_fields(pair: str) -> tuple[str, str]:
    english, comma, chinese = (part.strip() for part in pair.partition(","))
    if not comma or "," in chinese:
        raise typer.BadParameter(f"--pair {pair}: name two fields, English first, as in --pair en,zh")
    return english, chinese


def _tell(line: str) -> None:
    print(line.encode("utf-8", "backslashreplace").decode("utf-8"), file=sys.stderr)
