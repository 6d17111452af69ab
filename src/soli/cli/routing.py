"""`soli routing FILE`: over a text file, each expert's load and whether it prefers Chinese or English."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Column, Table
from rich.text import Text

from soli.cli._shared import options
from soli.cli._shared.console import number_columns, print_json, stdout_console
from soli.cli._shared.loading import load_text_model
from soli.cli._shared.progress import ProgressBar
from soli.cli._shared.text_input import evenly, file_texts

if TYPE_CHECKING:
    from soli.eval.routing import ExpertPreference, RoutingReport
    from soli.eval.scoring import LayerLoad

BARS = "▁▂▃▄▅▆▇█"
BARS_PER_LINE = 32
MAX_ROWS = 8  # of the preference table, per language
CHINESE, ENGLISH = "red", "blue"


def routing(
    file: Annotated[str, typer.Argument(help="A UTF-8 text file, a text per line (or a .tsv of the corpus step).")],
    model: Annotated[str, typer.Option(help="A model folder; nano is the bundled model.")] = "nano",
    png: Annotated[str | None, typer.Option(help="Write a heat map, layers by experts, to this file.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most this many texts, evenly taken.")] = None,
    permutations: Annotated[int, typer.Option(min=100, help="Shuffles behind the p values.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffles.")] = 0,
    json: options.Json = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
) -> None:
    """Report which experts a text file activates, how evenly, and which prefer Chinese or English beyond chance."""
    texts = evenly(file_texts(file), limit)
    from soli.eval.routing import report_routing, save_heat_map

    options.use_threads(threads)
    text_model = load_text_model(model, device, dtype)
    with ProgressBar("reading texts", len(texts)) as bar:
        report = report_routing(text_model, texts, permutations=permutations, seed=seed, on_progress=bar.advance)
    if png is not None:
        save_heat_map(png, report.loads, report.preferences)
    if json:
        print_json({"file": file, "model": model, **vars(report)})
    else:
        _print(report)


def _print(report: RoutingReport) -> None:
    console = stdout_console()
    names = {"zh": "Chinese", "en": "English", "neither": "neither"}
    counts = [
        f"{count.texts:,} {names[language]} ({count.tokens:,} tokens)"
        for language, count in report.languages.items()
        if count.texts
    ]
    console.print(f"texts read: {', '.join(counts)}", style="bold", soft_wrap=True)
    console.print(_load_table(report))
    if not report.preferences:
        console.print("preference: too few texts of one language; the test needs 10 of each", soft_wrap=True)
        return
    console.print(_preference_table(report.preferences))
    significant = sum(preference.prefers is not None for preference in report.preferences)
    console.print(
        f"{significant} of {len(report.preferences)} experts prefer a language (p < 0.01 for all together; whole texts "
        f"shuffled {report.permutations:,} times, seed {report.seed}).",
        soft_wrap=True,
    )


def _load_table(report: RoutingReport) -> Table:
    table = Table(
        Column("layer", no_wrap=True),
        Column("load, expert 0 first: ▅ is even", no_wrap=True),
        *number_columns("max violation", "dead"),
        Column("Chinese, 2 : 1 or more", style=CHINESE),
        Column("English, 2 : 1 or more", style=ENGLISH),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for load in report.loads:
        row: list[str | Text] = [load.layer, _load_bars(load), f"{load.max_violation:.2f}", str(len(load.dead_experts))]
        for language in ("zh", "en"):
            experts = [
                str(preference.expert)
                for preference in report.preferences
                if preference.layer == load.layer and preference.prefers == language and abs(preference.log2_ratio) >= 1
            ]
            row.append(" ".join(experts))
        table.add_row(*row)
    return table


def _load_bars(load: LayerLoad) -> Text:
    """A bar per expert; the even share is the fifth of eight heights, a dead expert a dot."""
    even = 1 / len(load.share)
    bars = "".join(BARS[min(7, int(4.5 * share / even))] if share else "·" for share in load.share)
    return Text("\n".join(bars[start : start + BARS_PER_LINE] for start in range(0, len(bars), BARS_PER_LINE)))


def _preference_table(preferences: list[ExpertPreference]) -> Table:
    table = Table(
        "expert",
        *number_columns("of Chinese tokens", "of English tokens", "Chinese : English", "p"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="the clearest preferences",
        title_justify="left",
    )
    for language, colour in (("zh", CHINESE), ("en", ENGLISH)):
        significant = [preference for preference in preferences if preference.prefers == language]
        significant.sort(key=lambda preference: -abs(preference.t))
        for preference in significant[:MAX_ROWS]:
            ratio = 2**preference.log2_ratio
            table.add_row(
                f"{preference.layer} #{preference.expert}",
                f"{100 * preference.chinese:.1f} %",
                f"{100 * preference.english:.1f} %",
                f"{ratio:.1f} : 1" if ratio >= 1 else f"1 : {1 / ratio:.1f}",
                f"{preference.p:.4f}",
                style=colour,
            )
    return table
