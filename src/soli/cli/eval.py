"""`soli eval MODEL --pairs FILE --text FILE`: translation quality, bits per byte, MTP acceptance and load."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from soli.cli._shared import options
from soli.cli._shared.console import number_columns, print_json, stdout_console
from soli.cli._shared.loading import load_text_model
from soli.cli._shared.progress import ProgressBar
from soli.cli._shared.ranks import join_first_rank, started_ranks
from soli.cli._shared.text_input import evenly, file_pairs, file_texts
from soli.errors import SoliError

if TYPE_CHECKING:
    from soli.eval.scoring import TextScores
    from soli.eval.translation import Direction, Quality


def eval(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder; nano is the bundled model.")] = "nano",
    pairs: Annotated[str | None, typer.Option(help="Held-out pairs: source, zh, en, separated by tabs.")] = None,
    text: Annotated[str | None, typer.Option(help="Held-out text, a line each (or a .tsv of the corpus step).")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many pairs and lines, evenly taken.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences translated together.")] = 64,
    beams: Annotated[int, typer.Option(min=1, help="Translate by a search with so many beams; 1 is greedy.")] = 1,
    length_penalty: Annotated[
        float | None,
        typer.Option(help="Rank the beams' translations by log-probability over length to this power; default 1."),
    ] = None,
    json: options.Json = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    threads: options.Threads = None,
    processes: options.Processes = None,
) -> None:
    """Score a model on held-out pairs (chrF and BLEU, both directions) and on held-out text (bits per byte)."""
    join_first_rank(model, device, dtype, True, memory, threads)
    if pairs is None and text is None:
        raise SoliError("there is nothing to evaluate on: give --pairs FILE, --text FILE or both")
    if length_penalty is not None and (beams == 1 or pairs is None):
        raise SoliError("--length-penalty ranks the beams of translations: give --beams above 1, and --pairs")
    if started_ranks(ctx, model, processes):
        return
    rows = evenly(file_pairs(pairs), limit) if pairs is not None else []
    texts = evenly(file_texts(text), limit) if text is not None else []
    if rows:
        import sacrebleu  # noqa: F401  (a missing package is reported before the translating)
    from soli.engine.beam_search import BeamSearchParams, beam_search_params
    from soli.eval.scoring import score_pairs, score_texts
    from soli.eval.translation import evaluate_direction

    search = beam_search_params(BeamSearchParams(beams), length_penalty=length_penalty) if beams > 1 else None
    options.use_threads(threads)
    text_model = load_text_model(model, device, dtype, True, memory)
    report = Report(model)
    if rows:
        with ProgressBar("translating pairs", 2 * len(rows)) as bar:
            report.directions["en-zh"] = evaluate_direction(text_model, rows, "zh", batch_size, bar.advance, search)
            report.directions["zh-en"] = evaluate_direction(text_model, rows, "en", batch_size, bar.advance, search)
        with ProgressBar("scoring pairs", 2 * len(rows)) as bar:
            report.on_pairs = score_pairs(text_model, rows, bar.advance)
    if texts:
        with ProgressBar("scoring texts", len(texts)) as bar:
            report.on_text = score_texts(text_model, texts, bar.advance)
    if json:
        print_json(report)
    else:
        _print(report)


@dataclass
class Report:
    """What is printed; with `--json` field for field."""

    model: str
    directions: dict[str, Direction] = field(default_factory=dict)  # "en-zh" and "zh-en"
    on_pairs: TextScores | None = None
    on_text: TextScores | None = None


def _print(report: Report) -> None:
    console = stdout_console()
    if report.directions:
        console.print(_quality_table(report.directions))
        for name, direction in report.directions.items():
            console.print(f"{name}  {direction.overall.signature}", style="dim", soft_wrap=True)
    for name, scores in (("pairs", report.on_pairs), ("text", report.on_text)):
        if scores is None:
            continue
        console.print(f"read from the {name}: {scores.tokens:,} tokens", style="bold")
        if scores.bits_per_byte:
            rates = ", ".join(f"{language} {bits:.3f}" for language, bits in scores.bits_per_byte.items())
            console.print(f"  bits per byte   {rates}")
        acceptance = "no MTP module" if scores.mtp_acceptance is None else f"{100 * scores.mtp_acceptance:.1f} %"
        console.print(f"  MTP acceptance  {acceptance}")
        for load in scores.load:
            dead = ", ".join(map(str, load.dead_experts)) or "none"
            console.print(f"  {load.layer:<14}  max violation {load.max_violation:.2f}, dead experts: {dead}")


def _quality_table(directions: dict[str, Direction]) -> Table:
    titles = [title for name in directions for title in (f"{name} chrF", "BLEU")]
    table = Table("source", *number_columns("pairs", *titles), box=box.SIMPLE_HEAD, pad_edge=False)
    for source in next(iter(directions.values())).by_source:
        _add_row(table, source, [direction.by_source[source] for direction in directions.values()])
    table.add_section()
    _add_row(table, "all", [direction.overall for direction in directions.values()])
    return table


def _add_row(table: Table, name: str, qualities: list[Quality]) -> None:
    cells = [f"{score:.1f}" for quality in qualities for score in (quality.chrf, quality.bleu)]
    table.add_row(name, f"{qualities[0].count:,}", *cells)
