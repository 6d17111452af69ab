"""Soli's engine under many concurrent requests, beside llama.cpp, transformers and vLLM, on the small model.

    python benchmarks/serve.py --lab LAB --llama DIR --vllm PYTHON
    python benchmarks/serve.py --lab LAB --rows load --rates 0.5 --rounds 1

Rows: `throughput`, 16 requests of 128 tokens in and 128 out that arrive together, generated tokens over the time for
all of it (llama.cpp by llama-batched-bench, transformers as one batch); `load`, as many requests that arrive at random
at each of the rates: milliseconds to the first token, waiting included, and between tokens (llama.cpp by llama-server,
which needs building too; transformers has no part in it). Soli's engine and vLLM's are stepped in their processes, all
see the same arrivals, and no prefix is shared. LAB and the paths are those of cpu.py, and so is what a quiet
measurement is. The picture is docs/images/serve.png.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from typing import Any

import cpu
import cpu_plot
import models
import quiet
import record
from contenders import QUICK, Absent, Lab, Work
from llama_server import llama_server

from soli.serve.load_generator import TokenTimes

ROWS = ("throughput", "load")
KINDS = ("bf16", "int8", "int4")
PEERS = {kind: (cpu.GGUF[kind], *(("vLLM bf16",) if kind == "bf16" else ())) for kind in KINDS}
NOTE = (
    "Wall time, two threads. Contenders take turns; a measurement in which other processes took more than 5 % of the "
    "machine is repeated. Arrivals are Poisson and the same for all; times begin when a request is due."
)


def throughput(lab: Lab, work: Work, rounds: int, limit: float) -> Iterator[cpu.Rows]:
    """The row small-batch of cpu.py, which Soli's engine answers: from results/cpu.json where it is of this commit."""
    known = [row for row in record.earlier("cpu", lab.threads) if row["row"] == "small-batch"]
    if known and work != QUICK:
        yield [row | {"row": "throughput"} for row in known]
        return
    for rows in cpu.measure_shape(lab, "small", ("small-batch",), work, rounds, limit):
        yield [row | {"row": "throughput"} for row in rows]


def open_loaded(lab: Lab, name: str, work: Work) -> AbstractContextManager[Any]:
    """A contender that answers "load"."""
    if not name.startswith("llama.cpp"):
        return cpu.open_contender(lab, "small", name, work)
    path = models.model_path(lab.folder, "small", f"gguf-{name.split()[1]}")
    return llama_server(lab, path, work, models.SHAPES["small"]["vocab_size"])


def under_load(
    lab: Lab, kinds: Sequence[str], rates: Sequence[float], count: int, work: Work, rounds: int, limit: float
) -> Iterator[cpu.Rows]:
    """The rows of each rate, as it is done."""
    names = dict.fromkeys(name for kind in kinds for name in (f"soli {kind}", *PEERS[kind]))
    with ExitStack() as stack:
        asks: dict[str, Any] = {}
        for name in names:
            try:
                asks[name] = stack.enter_context(open_loaded(lab, name, work))
                asks[name]("load", True, rate=10.0, count=2, seed=0)
            except Absent as reason:
                asks.pop(name, None)
                record.progress(f"load: without {name}: {reason}")
        for rate in rates:
            record.progress(f"load, {rate:g} requests per second")
            turns = {name: turn(ask, rate, count) for name, ask in asks.items()}
            measurements = quiet.interleaved(turns, rounds, limit)
            present = [kind for kind in kinds if f"soli {kind}" in measurements]
            yield [row for kind in present for row in load_rows(kind, rate, measurements)]


def turn(ask: Callable[..., TokenTimes], rate: float, count: int) -> Callable[[], dict[str, float]]:
    """One measurement: the figures of `count` requests. Every contender's turns have the same arrivals."""
    seeds = iter(range(10**6))
    return lambda: figures(ask("load", False, rate=rate, count=count, seed=next(seeds)))


def figures(times: TokenTimes) -> dict[str, float]:
    """Milliseconds: to the first token, the median and the longest; between tokens, the median and 95 of 100."""
    first = sorted(1000 * tokens[0] for tokens in times)
    between = sorted(1000 * (later - earlier) for tokens in times for earlier, later in itertools.pairwise(tokens))
    return {
        "first, median": first[len(first) // 2],
        "first, longest": first[-1],
        "between, median": between[len(between) // 2],
        "between, 95 of 100": between[int(0.95 * (len(between) - 1))],
    }


def load_rows(kind: str, rate: float, measurements: cpu.Measurements) -> Iterator[dict[str, Any]]:
    """Four rows: each figure of one kind of weights at one rate, beside the peers."""
    line = cpu.Line("small", "load", kind, PEERS[kind])
    peers = [name for name in PEERS[kind] if name in measurements]
    for figure in quiet.values(measurements[line.soli])[0]:
        values = {name: [one[figure] for one in quiet.values(measurements[name])] for name in (line.soli, *peers)}
        what = f"{rate:g} requests a second, {cpu.SAID['small']}, {kind}: {figure.replace('first', 'first token')}"
        row = cpu.judge(what, "ms", values[line.soli], {name: values[name] for name in peers}, line, measurements)
        yield row | {"row": "load", "rate": rate, "figure": figure}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = record.parser(__doc__, rounds=3)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--kinds", default="bf16,int8", help=f"weights under load, of {', '.join(KINDS)}")
    parser.add_argument("--rates", default="0.5,1", help="requests a second (default 0.5,1)")
    parser.add_argument("--requests", type=int, default=16, help="requests that arrive at each rate (default 16)")
    cpu.add_lab_options(parser)
    arguments = parser.parse_args(argv)
    for selected, known in ((arguments.rows, ROWS), (arguments.kinds, KINDS)):
        if unknown := set(selected.split(",")) - set(known):
            parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    return arguments


def measure(arguments: argparse.Namespace, work: Work) -> Iterator[cpu.Rows]:
    lab, rows = cpu.lab_of(arguments), arguments.rows.split(",")
    if "throughput" in rows:
        yield from throughput(lab, work, arguments.rounds, arguments.others)
    if "load" in rows:
        rates = [float(rate) for rate in arguments.rates.split(",")]
        kinds = arguments.kinds.split(",")
        yield from under_load(lab, kinds, rates, arguments.requests, work, arguments.rounds, arguments.others)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    work = QUICK if arguments.quick else Work()
    size = {"rounds": arguments.rounds, "others_at_most": arguments.others, **asdict(work)}
    for rows in measure(arguments, work):
        for row in rows:
            print(cpu.describe(row), flush=True)
        if not arguments.quick:
            size["requests"] = arguments.requests
            result = record.merge("serve", NOTE, size, rows, threads=arguments.threads)
            cpu_plot.draw_serving(result["rows"], record.ROOT / "docs" / "images" / "serve.png")


if __name__ == "__main__":
    main()
