"""`soli data build RECIPE` makes a recipe's corpus and tokens from public packages, `soli data pack` makes tokens from
a user's own files, `soli data inspect` shows either."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from soli.cli._shared.data_tables import print_counts, print_inspection, print_packed
from soli.cli._shared.options import Assignments
from soli.cli._shared.progress import StepReport
from soli.data.inspection import inspect_folder
from soli.data.pack import Input, PackConfig, pack_inputs
from soli.data.readers import InputLayout
from soli.data.recipe import load_recipe
from soli.recipes import corpus_builder, read_data_config

app = typer.Typer(help="Build, pack and inspect corpora.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def build(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, such as nano-zh-en, or its folder or TOML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default the recipe's data.folder.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for downloads and the text read from them; default OUT/cache.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Build without the sources that cannot be fetched.")
    ] = False,
    extra: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A TSV file of pairs of your own: source, Chinese, English; may be given several times.",
        ),
    ] = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts and tokens as JSON.")] = False,
) -> None:
    """Fetch the packages of the recipe's corpus, clean and split their text, learn a tokenizer, pack tokens.

    A stopped build continues where it was when run again.
    """
    config = read_data_config(load_recipe(recipe, assignments or []))
    build_data = corpus_builder(config)
    folder = out or Path(config.folder)
    with StepReport(quiet=as_json) as steps:
        build_data(config, folder, cache or folder / "cache", steps.report, allow_missing, extra or ())
    print_counts(folder, as_json)


@app.command()
def pack(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT[=WEIGHT]...",
            help="Files (.jsonl, .txt, .tsv, .parquet), folders of one kind of them, or saved `datasets` folders.",
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="A folder with tokenizer.json, or nano: the bundled model.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
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
    are counted, reported with file and number, and listed in OUT/bad_lines.jsonl. Options override the recipe.
    """
    fields = _two_fields(pair) if pair is not None else (field,)
    options = {"heldout_every": heldout_every, "fim_rate": fim_rate, "longest_document": longest, "seed": seed}
    values = recipe_values(recipe, options) if recipe else {}
    values |= {name: value for name, value in options.items() if value is not None}
    config = PackConfig(tuple(map(parse_input, inputs)), InputLayout(fields, lines, form), **values)
    with StepReport(quiet=as_json) as steps:
        meta = pack_inputs(config, tokenizer_folder(tokenizer), out, steps.report, _print_line)
    if as_json:
        print(json.dumps({"folder": str(out), **meta}, indent=2))
    else:
        print_packed(out, meta)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that soli data build or pack wrote.")],
    samples: Annotated[int, typer.Option(min=0, help="Documents to show as text.")] = 6,
    seed: Annotated[int, typer.Option(help="Another seed, other documents.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Tokens by source, characters per token, lengths of documents, and a few documents as they are trained on."""
    inspection = inspect_folder(folder, samples, seed)
    if as_json:
        print(json.dumps(inspection, indent=2, ensure_ascii=False))
    else:
        print_inspection(folder, inspection)


def parse_input(argument: str) -> Input:
    """`PATH` or `PATH=WEIGHT`; an existing path is used unchanged, with whatever = it has in its name."""
    path, equals, weight = argument.rpartition("=")
    if not equals or Path(argument).exists():
        return Input(Path(argument))
    try:
        return Input(Path(path), float(weight))
    except ValueError:
        raise typer.BadParameter(f"{argument}: {weight!r} is not a weight; write PATH=2.5") from None


def recipe_values(recipe: str, names: dict[str, Any]) -> dict[str, Any]:
    """The fields among `names` that the recipe's [data] section sets, checked as `soli data build` checks them."""
    table = load_recipe(recipe)
    config = read_data_config(table)
    return {name: getattr(config, name) for name in names if name in table.get("data", {})}


def tokenizer_folder(name: str) -> Path:
    """The folder of the bundled model for `nano`, else the folder of that name."""
    return Path(__file__).resolve().parents[1] / "models" / "nano" if name == "nano" else Path(name)


def _two_fields(pair: str) -> tuple[str, str]:
    english, comma, chinese = (part.strip() for part in pair.partition(","))
    if not comma or "," in chinese:
        raise typer.BadParameter(f"--pair {pair}: name two fields, English first, as in --pair en,zh")
    return english, chinese


def _print_line(line: str) -> None:
    print(line.encode("utf-8", "backslashreplace").decode("utf-8"), file=sys.stderr)
