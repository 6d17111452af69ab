"""`soli bench serve URL|MODEL`: throughput and latency of a server over arrival rates."""

import asyncio
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import httpx
import typer
from rich.table import Table

from soli.atomic_file import replace_file
from soli.cli._shared import options
from soli.cli._shared.console import number_columns, print_json, stdout_console
from soli.cli._shared.progress import ProgressBar
from soli.errors import SoliError
from soli.serve.load_generator import Workload, find_server, measure, save_plot

app = typer.Typer(help="Measure a server under load.", no_args_is_help=True, rich_markup_mode=None)
LOAD_TIMEOUT = 600.0  # seconds that a model may take to load


@app.command()
def serve(
    target: Annotated[
        str, typer.Argument(metavar="[URL|MODEL]", help="A server's address, or a model folder to serve for this.")
    ] = "nano",
    rates: Annotated[
        str, typer.Option(help="Requests per second, with commas; inf sends all at once.")
    ] = "0.5,1,2,4,inf",
    requests: Annotated[int, typer.Option(min=1, help="Requests at each rate, for each seed.")] = 32,
    seeds: Annotated[str, typer.Option(help="Seeds of arrivals and prompts, with commas.")] = "0",
    prompt_words: Annotated[int, typer.Option(min=1, help="Words in each prompt, drawn at random.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens requested in each answer.")] = 64,
    api_key: Annotated[str | None, typer.Option(envvar="SOLI_API_KEY", help="The server's key.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="NAME", help="Write NAME.json and the plot NAME.png.")] = None,
    threads: options.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Send requests at random times (Poisson arrivals) and measure tokens per second, time to the first piece of text,
    between pieces and to the end. Times count from the moment a request was due."""
    arrival_rates = _numbers(rates, "rates", float)
    if any(not rate > 0 for rate in arrival_rates):
        raise SoliError(f"--rates has {rates!r}: give numbers above 0, or inf")
    load = Workload(requests, _numbers(seeds, "seeds", int), prompt_words, new_tokens)
    is_address = target.startswith(("http://", "https://"))
    if is_address and threads is not None:
        raise typer.BadParameter("--threads goes with a model folder: a server that is running has its own threads")
    with contextlib.nullcontext(target.rstrip("/")) if is_address else running_server(target, threads) as url:
        server = asyncio.run(find_server(url, api_key if is_address else None))
        with ProgressBar("requests", len(arrival_rates) * len(load.seeds) * requests) as bar:
            rows = [asyncio.run(measure(server, rate, load, bar.advance)) for rate in arrival_rates]
    result = {"server": target, "model": server.model, "load": vars(load), "rows": rows}
    if as_json:
        print_json(result)
    else:
        _print(rows)
    if out is not None:
        _save(out, result, f"{server.model}, {prompt_words} words in, {new_tokens} tokens out")


def _numbers(text: str, name: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise SoliError(f"--{name} has {text!r}: give numbers separated by commas") from None


def _save(out: Path, result: dict[str, Any], title: str) -> None:
    save_plot(out.with_name(f"{out.name}.png"), result["rows"], title)
    replace_file(out.with_name(f"{out.name}.json"), json.dumps(result, indent=2) + "\n")
    print(f"soli: wrote {out}.json and {out}.png", file=sys.stderr)


@contextlib.contextmanager
def running_server(model: str, threads: int | None = None) -> Iterator[str]:
    """A server of this model in a process of its own, on a free port; its address once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "soli", "serve", model, "--port", str(port)]
    if threads is not None:
        command += ["--threads", str(threads)]
    environment = {name: value for name, value in os.environ.items() if name != "SOLI_API_KEY"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)
        try:
            _wait_until_ready(process, url, log)
            yield url
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + LOAD_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise SoliError(f"the server did not start ({lines[-1] if lines else 'its log is empty'}): try soli serve")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise SoliError(f"the model did not load within {LOAD_TIMEOUT:.0f} seconds: start soli serve and give its address")


def _print(rows: list[dict[str, Any]]) -> None:
    counts = ("requests/s", "done", "failed", "tokens/s")
    times = ("first ms p50", "p95", "p99", "between ms p50", "p95", "p99")
    table = Table(*number_columns(*counts, *times), box=None, pad_edge=False, header_style="bold")
    for row in rows:
        rate = "at once" if row["rate"] is None or math.isinf(row["rate"]) else f"{row['rate']:g}"
        finished = row["requests"] - row["failed"]
        percentiles = [f"{value:,.1f}" for name in ("first", "between") for value in (row[name] or {}).values()]
        table.add_row(rate, str(finished), str(row["failed"]), f"{row['tokens_per_second']:,.1f}", *percentiles)
    stdout_console().print(table)
    for error in sorted({error for row in rows for error in row["errors"]}):
        print(f"soli: {error}", file=sys.stderr)
