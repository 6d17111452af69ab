"""`soli routing FILE`: over a text file, each expert's load and whether it prefers Chinese or English."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from soli.cli._shared import options
from soli.cli._shared.console import stdout_console
from soli.cli._shared.progress import ProgressBar
from soli.cli._shared.text_input import evenly, file_texts

if TYPE_CHECKING:
    from soli.eval.routing_report import RoutingReport
    from soli.eval.routing_statistics import ExpertPreference, LayerLoad

BARS = "▁▂▃▄▅▆▇█"
STRIP = 32  # experts per line of the load strip
MOST_SHOWN = 8
CHINESE, ENGLISH = "red", "blue"


def routing(
    file: Annotated[str, typer.Argument(help="A UTF-8 text file, a text per line (or a .tsv of the corpus step).")],
    model: Annotated[str, typer.Option(help="A model folder; nano is the model in the box.")] = "nano",
    png: Annotated[str | None, typer.Option(help="Write a heat map, layers by experts, to this file.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most this many texts, evenly taken.")] = None,
    permutations: Annotated[int, typer.Option(min=100, help="Shuffles behind the p values.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffles.")] = 0,
    json: options.Json = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
) -> None:
    """Report which experts a text file plays, how evenly, and which prefer Chinese or English more than by chance."""
    texts = evenly(file_texts(file), limit)
    from soli.engine.text_model import open_text_model
    from soli.eval.routing_report import report_routing

    text_model = open_text_model(model, device, dtype)
    with ProgressBar("reading texts", len(texts)) as bar:
        report = report_routing(text_model, texts, permutations=permutations, seed=seed, on_part=bar.advance)
    if png is not None:
        from soli.eval.routing_plot import save_heat_map

        save_heat_map(png, report.loads, report.preferences)
    if json:
        from soli.cli._shared.expert_tables import print_json

        print_json({"file": file, "model": model, **dataclasses.asdict(report)})
    else:
        _print(report)


def _print(report: RoutingReport) -> None:
    console = stdout_console()
    names = {"zh": "Chinese", "en": "English", "neither": "neither"}
    read = [f"{one.texts:,} {names[key]} ({one.tokens:,} tokens)" for key, one in report.languages.items() if one.texts]
    console.print(f"texts read: {', '.join(read)}", style="bold", soft_wrap=True)
    console.print(_load_table(report))
    if not report.preferences:
        console.print("preference: too few texts of one language to tell; it takes 10 of each", soft_wrap=True)
        return
    console.print(_preference_table(report.preferences))
    told = sum(one.prefers is not None for one in report.preferences)
    console.print(
        f"{told} of {len(report.preferences)} experts prefer a language (p < 0.01 for all together; whole texts "
        f"shuffled {report.permutations:,} times, seed {report.seed}).",
        soft_wrap=True,
    )


def _load_table(report: RoutingReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("layer", "load, expert 0 first: ▅ is even"):
        table.add_column(title, no_wrap=True)
    for title in ("max violation", "idle"):
        table.add_column(title, justify="right")
    table.add_column("Chinese, 2 : 1 or more", style=CHINESE)
    table.add_column("English, 2 : 1 or more", style=ENGLISH)
    for load in report.loads:
        clear = [one for one in report.preferences if one.layer == load.layer and abs(one.log2_ratio) >= 1]
        fans = (" ".join(str(one.expert) for one in clear if one.prefers == language) for language in ("zh", "en"))
        table.add_row(load.layer, _strip(load), f"{load.max_violation:.2f}", str(len(load.idle)), *fans)
    return table


def _strip(load: LayerLoad) -> Text:
    """A bar per expert; the even share is the fifth of eight heights, an idle expert a dot."""
    even = 1 / len(load.share)
    bars = "".join(BARS[min(7, int(4.5 * share / even))] if share else "·" for share in load.share)
    return Text("\n".join(bars[start : start + STRIP] for start in range(0, len(bars), STRIP)))


def _preference_table(preferences: list[ExpertPreference]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="the clearest preferences", title_justify="left")
    table.add_column("expert")
    for title in ("of Chinese tokens", "of English tokens", "Chinese : English", "p"):
        table.add_column(title, justify="right")
    for language, colour in (("zh", CHINESE), ("en", ENGLISH)):
        chosen = sorted((one for one in preferences if one.prefers == language), key=lambda one: -abs(one.t))
        for one in chosen[:MOST_SHOWN]:
            ratio = 2**one.log2_ratio
            said = f"{ratio:.1f} : 1" if ratio >= 1 else f"1 : {1 / ratio:.1f}"
            figures = (f"{100 * one.chinese:.1f} %", f"{100 * one.english:.1f} %", said, f"{one.p:.4f}")
            table.add_row(f"{one.layer} #{one.expert}", *figures, style=colour)
    return table
