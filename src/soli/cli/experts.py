"""`soli experts VERB`: which experts tokens choose, recorded, and what a cache of them would bring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from soli.cli._shared import options
from soli.cli._shared.console import number_columns, print_json, stdout_console
from soli.cli._shared.loading import load_text_model
from soli.cli._shared.progress import ProgressBar
from soli.cli._shared.text_input import evenly, file_texts
from soli.errors import SoliError
from soli.quantities import parse_bytes, parse_rate, parse_share, scaled

if TYPE_CHECKING:
    from soli.experts.replay import Replay
    from soli.experts.trace import ExpertTrace

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def record(
    model: Annotated[str, typer.Argument(help="A model folder; nano is the bundled model.")],
    file: Annotated[str, typer.Argument(help="A UTF-8 text file, a text per line (or a .tsv of the corpus step).")],
    out: Annotated[Path, typer.Option(help="The trace to write.")],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after this many tokens.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most this many texts, evenly taken.")] = None,
    json: options.Json = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    threads: options.Threads = None,
) -> None:
    """Record which experts a model chooses for each token of a text file."""
    texts = evenly(file_texts(file), limit)
    from soli.eval.expert_trace import record_experts

    options.use_threads(threads)
    expert_bytes = _expert_bytes(model)
    text_model = load_text_model(model, device, dtype, memory=memory)
    with ProgressBar("reading texts", len(texts)) as bar:
        trace = record_experts(
            text_model, texts, expert_bytes=expert_bytes, max_tokens=max_tokens, on_progress=bar.advance
        )
    trace.save(out)
    T, L, K = trace.expert_ids_TLK.shape
    if json:
        print_json({"trace": str(out), "tokens": T, "layers": L, "chosen": K, "experts": trace.experts})
    else:
        print(f"{out}: {T:,} tokens, {K} of {trace.experts} experts in each of {L} layers")


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="A file of soli experts record, or of --experts --json.")],
    cache: Annotated[str, typer.Option(help="Sizes of the cache: 8GB,16GB or shares of all experts, 25%,50%.")],
    model: Annotated[
        str | None, typer.Option(help="The model whose experts' sizes count; by default those of the trace.")
    ] = None,
    disk: Annotated[str | None, typer.Option(metavar="SPEED", help="Show seconds per token too, at 3GB/s.")] = None,
    skip: Annotated[
        int | None, typer.Option(min=0, help="Tokens that fill the cache and do not count; a tenth by default.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Replay a trace of chosen experts through every policy of the cache, and through the best possible one."""
    from soli.experts.replay import BELADY
    from soli.experts.replay import names as policy_names
    from soli.experts.replay import replay as replayed
    from soli.experts.trace import read_expert_trace

    speed = None if disk is None else parse_rate(disk, "--disk")
    expert_trace = read_expert_trace(trace)
    if model is not None:
        expert_trace = _of_model(expert_trace, model)
    sizes = {text.strip(): _slots(text, expert_trace) for text in cache.split(",")}
    tokens = len(expert_trace.expert_ids_TLK)
    skipped = tokens // 10 if skip is None else skip
    names = policy_names()
    rows = []
    with ProgressBar("replaying", len(sizes) * len(names)) as bar:
        for text, slots in sizes.items():
            results = []
            for name in names:
                results.append(replayed(expert_trace, name, slots, skipped))
                bar.advance(1)
            rows.append(CacheSize.of(text, slots, expert_trace, results, speed))
    if json:
        shape = dict(zip(("tokens", "layers", "chosen"), expert_trace.expert_ids_TLK.shape, strict=True))
        print_json(
            {"trace": str(trace), **shape, "experts": expert_trace.experts, "skipped": skipped, "sizes": rows}
        )
        return
    _print(rows, expert_trace, skipped, BELADY)


@app.command()
def forget(
    model: Annotated[str, typer.Argument(help="A model folder; nano is the bundled model.")] = "nano",
    json: options.Json = False,
) -> None:
    """Forget which experts a model used with --memory, which the next run would read first."""
    from soli.experts.load import usage_file_of

    file = usage_file_of(model)
    forgotten = file.forget()
    if json:
        print_json({"model": model, "file": str(file.path), "forgotten": forgotten})
    else:
        print(f"{file.path}: deleted" if forgotten else f"nothing is remembered of {model}")


@dataclass(frozen=True)
class PolicyRow:
    """`of_best`: the part of the distance from LRU to the best possible hit rate."""

    policy: str
    hit_rate: float
    of_best: float | None
    bytes_per_token: float | None
    seconds_per_token: float | None


@dataclass(frozen=True)
class CacheSize:
    """One size of the cache: in slots, as a share of all experts and of those that a token chooses."""

    cache: str
    slots: int
    of_all: float
    of_demand: float
    policies: list[PolicyRow]

    @classmethod
    def of(cls, text: str, slots: int, trace: ExpertTrace, results: list[Replay], speed: int | None) -> CacheSize:
        from soli.experts.replay import gained

        lru, best = results[0].hit_rate, results[-1].hit_rate
        rows = []
        for result in results:
            read = result.bytes_per_token
            seconds = None if read is None or speed is None else read / speed
            rows.append(PolicyRow(result.policy, result.hit_rate, gained(result.hit_rate, lru, best), read, seconds))
        return cls(text, slots, slots / trace.all_experts, slots / trace.demand, rows)


def _print(sizes: list[CacheSize], trace: ExpertTrace, skipped: int, best: str) -> None:
    T, L, K = trace.expert_ids_TLK.shape
    console = stdout_console()
    console.print(
        f"{T:,} tokens, {K} of {trace.experts} experts in each of {L} layers; the first {skipped:,} tokens fill the "
        f"cache and do not count",
        style="bold",
        soft_wrap=True,
    )
    table = Table(
        "cache", "policy", *number_columns("hits", "of LRU to best", "read per token", "seconds"),
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for size in sizes:
        label = (size.cache, f"{size.slots:,} experts, {size.of_demand:.1f} x a token's", f"{size.of_all:.1%} of all")
        for number, row in enumerate(size.policies):
            table.add_row(
                label[number] if number < len(label) else "",
                f"{row.policy} (the best possible)" if row.policy == best else row.policy,
                f"{row.hit_rate:.1%}",
                "" if row.of_best is None else f"{row.of_best:.0%}",
                "" if row.bytes_per_token is None else scaled(row.bytes_per_token, "B"),
                "" if row.seconds_per_token is None else f"{row.seconds_per_token:.3g}",
            )
        table.add_section()
    console.print(table)


def _slots(text: str, trace: ExpertTrace) -> int:
    """One entry of --cache as a number of experts, of which there are no more than the model has."""
    if text.strip().endswith("%"):
        slots = int(parse_share(text, "--cache") * trace.all_experts)
    else:
        size = parse_bytes(text, "--cache")
        if not trace.expert_bytes:
            raise SoliError(
                f"--cache is {text.strip()}, but this trace does not say how large an expert is: give --model, or a "
                f"share of all experts such as 25%"
            )
        slots = size // trace.expert_bytes
    return min(slots, trace.all_experts)


def _of_model(trace: ExpertTrace, model: str) -> ExpertTrace:
    """The trace with the model's number and size of experts."""
    from soli.checkpoint import open_checkpoint
    from soli.experts.trace import ExpertTrace

    config = open_checkpoint(model, mtp=False).config
    chosen = trace.expert_ids_TLK.shape[2]
    if trace.experts > (config.n_routed_experts or 0) or chosen != config.num_experts_per_tok:
        raise SoliError(
            f"{model} chooses {config.num_experts_per_tok} of {config.n_routed_experts} experts of a layer, but the "
            f"trace {chosen} of {trace.experts}: give the model that the trace is of"
        )
    return ExpertTrace(trace.expert_ids_TLK, config.n_routed_experts or 0, _expert_bytes(model))


def _expert_bytes(model: str) -> int:
    """What one of a model's experts takes in the cache."""
    from soli.checkpoint import open_checkpoint
    from soli.experts.sources import sources_of

    return sources_of(open_checkpoint(model, mtp=False)).slot_bytes
