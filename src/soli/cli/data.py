"""`soli data build RECIPE` makes a recipe's corpus and tokens from public packages, `soli data pack` makes tokens from
a user's own files, `soli data inspect` shows either."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from soli.cli._shared.console import number_columns, print_json, stdout_console
from soli.cli._shared.options import Assignments
from soli.cli._shared.progress import StepReport
from soli.data.pack import Input, PackConfig, pack_inputs
from soli.data.readers import InputLayout
from soli.data.recipe import load_recipe
from soli.data.token_files import inspect_folder, read_meta
from soli.data.tokenizer import tokenizer_folder
from soli.input_files import read_object
from soli.recipes import corpus_builder, read_data_config

app = typer.Typer(help="Build, pack and inspect corpora.", no_args_is_help=True, rich_markup_mode=None)
COUNTED = ("pairs", "lines", "characters", "heldout")  # fields of a source in counts.json


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
    _print_counts(folder, as_json)


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
        print_json({"folder": str(out), **meta}, indent=2)
    else:
        _print_packed(out, meta)


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
        print_json(inspection, indent=2)
    else:
        _print_inspection(folder, inspection)


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


def _two_fields(pair: str) -> tuple[str, str]:
    english, comma, chinese = (part.strip() for part in pair.partition(","))
    if not comma or "," in chinese:
        raise typer.BadParameter(f"--pair {pair}: name two fields, English first, as in --pair en,zh")
    return english, chinese


def _print_line(line: str) -> None:
    print(line.encode("utf-8", "backslashreplace").decode("utf-8"), file=sys.stderr)


def _print_counts(folder: Path, as_json: bool) -> None:
    """counts.json and meta.json of a finished build, as one table or one JSON object."""
    counts = read_object(folder / "counts.json")
    meta = read_meta(folder)
    if as_json:
        print_json({**counts, "meta": meta}, indent=2)
        return
    table = _table("source", "pairs", "lines", "characters", "held out", "tokens")
    for name, row in counts["sources"].items():
        tokens = meta["sources"].get(name, {}).get("tokens", 0)
        table.add_row(name, *(_number(row.get(field)) for field in COUNTED), _number(tokens))
    totals = [sum(row.get(field, 0) for row in counts["sources"].values()) for field in COUNTED]
    table.add_row("all", *map(_number, totals), _number(meta["train_tokens"]))
    stdout_console().print(table)
    for name in counts["skipped"]:
        print(f"without {name}, which could not be fetched")
    print(f"wrote {folder}: {meta['train_tokens']:,} training tokens, {meta['valid_tokens']:,} held out")


def _print_packed(folder: Path, meta: dict[str, Any]) -> None:
    """What `pack_inputs` wrote, as one table and a line for the bad lines."""
    table = _table("source", "documents", "tokens", "share", "held out")
    for name in dict.fromkeys((*meta["sources"], *meta["valid_sources"])):
        row = meta["sources"].get(name, {"tokens": 0, "documents": 0})
        heldout = meta["valid_sources"].get(name, {}).get("documents")
        share = f"{row['tokens'] / meta['train_tokens']:.1%}"
        table.add_row(escape(name), _number(row["documents"]), _number(row["tokens"]), share, _number(heldout))
    stdout_console().print(table)
    bad_lines = meta["bad_lines"]
    if bad_lines:
        print(f"bad lines left out: {sum(bad_lines.values()):,}, listed in {folder / 'bad_lines.jsonl'}")
    print(f"wrote {folder}: {meta['train_tokens']:,} training tokens, {meta['valid_tokens']:,} held out")


def _print_inspection(folder: Path, inspection: dict[str, Any]) -> None:
    """What `inspect_folder` returned, for a reader."""
    console = stdout_console()
    table = _table("source", "documents", "tokens", "share", "tokens/document")
    for name, row in sorted(inspection["sources"].items(), key=lambda item: -item[1]["tokens"]):
        mean = row["tokens"] / max(1, row["documents"])
        share = row["tokens"] / max(1, inspection["train_tokens"])
        table.add_row(name, _number(row["documents"]), _number(row["tokens"]), f"{share:.1%}", f"{mean:.1f}")
    console.print(table)
    print(f"{folder}: {inspection['train_tokens']:,} training and {inspection['valid_tokens']:,} held-out tokens")
    compression = ", ".join(f"{value:.2f} {name}" for name, value in inspection["characters_per_token"].items())
    print(f"vocabulary {inspection['vocab_size']:,}; characters per token: {compression or 'unknown'}")
    lengths = ", ".join(f"{name} {value:,}" for name, value in inspection["document_tokens"].items())
    print(f"document lengths: {lengths} tokens")
    for sample in inspection["samples"]:
        console.print(f"[dim]at {sample['at']:,}[/dim] {escape(sample['text'])}", soft_wrap=True)


def _table(*columns: str) -> Table:
    return Table(columns[0], *number_columns(*columns[1:]), box=None, pad_edge=False)


def _number(value: int | None) -> str:
    return f"{value:,}" if value else ""
