"""Load on a server or an engine: requests that arrive at random, and when each of their tokens came.

Arrivals are Poisson: the gaps between them are exponential with mean 1 / rate, drawn from a seed. The load is open: a
request is sent when it is due, however many are in progress, and its times count from that moment, so waiting anywhere
is part of them. A server is measured through OpenAI's /v1/completions with streaming, so any server that has it can be;
an engine in this process is stepped (`drive_engine`).
"""

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from soli.analysis.figure import new_figure, save_figure, style_panel
from soli.errors import SoliError
from soli.input_files import parse_json

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work night point home water room mother area money story "
    "fact month lot right study book eye job word business issue side kind head house service friend father power"
)
PERCENTILES = (50, 95, 99)
PLOTTED_TIMES = {"first": "to the first piece of text", "between": "between pieces", "whole": "to the end"}

TokenTimes = list[list[float]]  # per request, seconds from its arrival to each of its tokens


@dataclass(frozen=True)
class Workload:
    """What is sent at each rate: `requests` for each of `seeds`, of about `prompt_words` tokens or more, for at most
    `new_tokens` each, sampled greedily. Answers that end earlier, on servers without `ignore_eos`, count as well."""

    requests: int = 32
    seeds: Sequence[int] = (0,)
    prompt_words: int = 64
    new_tokens: int = 64


@dataclass
class RequestTiming:
    """One request: seconds from when it was due to each piece of text and to its end; `error` if it failed."""

    pieces: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class TargetServer:
    """Where requests are sent: base address, model name, API key; `full_length`: it takes `ignore_eos`, so every answer
    has all the tokens that were asked for."""

    url: str
    model: str
    key: str | None = None
    full_length: bool = False


def arrivals(rate: float, count: int, generator: random.Random) -> list[float]:
    """Seconds from the start at which `count` requests are due, the first at once; math.inf: all at once."""
    gaps = [generator.expovariate(rate) if math.isfinite(rate) else 0.0 for _ in range(count)]
    return [0.0, *accumulate(gaps)][:count]


def drive_engine(
    due: Sequence[float], new_tokens: int, add: Callable[[int], None], step: Callable[[], list[int]]
) -> TokenTimes:
    """Steps an engine until every request has `new_tokens` tokens.

    `add(number)` submits a request; `step()` runs one step and returns, for each token that came, its request's number.
    """
    times: TokenTimes = [[] for _ in due]
    start = time.perf_counter()
    submitted = 0
    while any(len(tokens) < new_tokens for tokens in times):
        now = time.perf_counter() - start
        while submitted < len(due) and due[submitted] <= now:
            add(submitted)
            submitted += 1
        if all(len(tokens) >= new_tokens for tokens in times[:submitted]):
            time.sleep(max(0.0, due[submitted] - now))
            continue
        numbers = step()
        now = time.perf_counter() - start
        for number in numbers:
            times[number].append(now - due[number])
    return times


async def find_server(url: str, key: str | None) -> TargetServer:
    """The server's first model, and whether it takes `ignore_eos`; SoliError if there is no server of this kind."""
    try:
        async with _client(url, key) as client:
            answer = await client.get("/v1/models")
            if answer.status_code != 200:
                raise SoliError(
                    f"{url} answers /v1/models with status {answer.status_code}: {_error_message(answer.text)}"
                )
            model = str(answer.json()["data"][0]["id"])
            body = {"model": model, "prompt": "time", "max_tokens": 1, "ignore_eos": True}
            probe = await client.post("/v1/completions", json=body)
            return TargetServer(url, model, key, full_length=probe.status_code == 200)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise SoliError(f"{url} is no OpenAI-compatible server ({error}): give its address without /v1") from error


async def measure(
    server: TargetServer, rate: float, load: Workload, on_end: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """One row of metrics for one arrival rate, in requests per second; math.inf sends all at once."""
    timings: list[RequestTiming] = []
    seconds = 0.0
    for seed in load.seeds:
        generator = random.Random(seed)
        due = arrivals(rate, load.requests, generator)
        words = (generator.choices(WORDS.split(), k=load.prompt_words) for _ in due)
        bodies = [_body(server, " ".join(prompt), load.new_tokens) for prompt in words]
        start = time.perf_counter()
        timings += await _send_all(server, start, due, bodies, on_end)
        seconds += time.perf_counter() - start
    return {"rate": rate if math.isfinite(rate) else None, **summarize(timings, seconds)}


def summarize(timings: Sequence[RequestTiming], seconds: float) -> dict[str, Any]:
    """Counts, tokens per second, and percentiles in milliseconds: to the first piece of text, between pieces, to the
    end. None where nothing was measured."""
    good = [timing for timing in timings if timing.error is None]
    errors = sorted({timing.error for timing in timings if timing.error is not None})
    tokens = sum(timing.tokens for timing in good)
    return {
        "requests": len(timings),
        "failed": len(timings) - len(good),
        "errors": errors[:3],
        "seconds": seconds,
        "prompt_tokens": sum(timing.prompt_tokens for timing in good),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(good) / seconds,
        "first": _percentiles([timing.pieces[0] for timing in good if timing.pieces]),
        "between": _percentiles([later - earlier for timing in good for earlier, later in pairwise(timing.pieces)]),
        "whole": _percentiles([timing.end for timing in good]),
    }


def save_plot(path: str | Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Writes a PNG of tokens per second and times over the arrival rate. Rows are `measure`'s; the one without a rate,
    all at once, is the last."""
    figure = new_figure(11, 7)
    figure.suptitle(title, fontsize=11)
    rows = sorted(rows, key=lambda row: (row["rate"] is None, row["rate"] or 0.0))
    rates = ["at once" if row["rate"] is None else f"{row['rate']:g}" for row in rows]
    axes = list(figure.subplots(2, 2).flat)
    axes[0].plot(rates, [row["tokens_per_second"] for row in rows], marker="o", linewidth=1.1)
    style_panel(axes[0], "generated", "requests per second", "tokens per second")
    for axis, (name, label) in zip(axes[1:], PLOTTED_TIMES.items(), strict=True):
        _plot_percentiles(axis, rates, [row[name] for row in rows])
        style_panel(axis, label, "requests per second", "milliseconds")
    for axis in axes:
        axis.set_ylim(bottom=0)
    save_figure(figure, path)


def _plot_percentiles(axis: Any, rates: Sequence[str], times: Sequence[dict[str, float] | None]) -> None:
    """One line per percentile; a rate at which nothing was measured is a gap."""
    for percentile in next((row for row in times if row), {}):
        values = [row[percentile] if row else float("nan") for row in times]
        axis.plot(list(rates), values, marker="o", linewidth=1.1, label=percentile)
    axis.legend(fontsize=8)


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = np.percentile(np.asarray(seconds) * 1000.0, PERCENTILES)
    return {f"p{percent}": float(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def _body(server: TargetServer, prompt: str, new_tokens: int) -> dict[str, Any]:
    body = {"model": server.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    return body | {"stream_options": {"include_usage": True}} | ({"ignore_eos": True} if server.full_length else {})


async def _send_all(
    server: TargetServer,
    start: float,
    due: Sequence[float],
    bodies: Sequence[dict[str, Any]],
    on_end: Callable[[int], None],
) -> list[RequestTiming]:
    """Sends each body when it is due, in seconds after `start`."""
    async with _client(server.url, server.key) as client:

        async def send(seconds: float, body: dict[str, Any]) -> RequestTiming:
            await asyncio.sleep(max(0.0, start + seconds - time.perf_counter()))
            timing = await _send(client, body, start + seconds)
            on_end(1)
            return timing

        return await asyncio.gather(*map(send, due, bodies))


async def _send(client: httpx.AsyncClient, body: dict[str, Any], due: float) -> RequestTiming:
    timing = RequestTiming()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                timing.error = f"status {answer.status_code}: {_error_message(answer.text)}"
                return timing
            complete = False
            async for line in answer.aiter_lines():
                complete = complete or line == "data: [DONE]"
                if line.startswith("data: {"):
                    _record_chunk(parse_json(line[6:], "a chunk"), timing, time.perf_counter() - due)
            timing.end = time.perf_counter() - due
            if not complete and timing.error is None:
                timing.error = "the stream broke off"
    except (httpx.HTTPError, SoliError, ValueError, LookupError, TypeError, AttributeError) as error:  # of any server
        timing.error = f"{type(error).__name__}: {_error_message(str(error))}"
    return timing


def _record_chunk(chunk: dict[str, Any], timing: RequestTiming, seconds: float) -> None:
    if "error" in chunk:
        timing.error = _error_message(json.dumps(chunk))
    if any(choice.get("text") for choice in chunk.get("choices") or ()):
        timing.pieces.append(seconds)
    if usage := chunk.get("usage"):
        timing.prompt_tokens = int(usage["prompt_tokens"])
        timing.tokens = int(usage["completion_tokens"])


def _error_message(body: str) -> str:
    """The message of an error's body, shortened."""
    with contextlib.suppress(SoliError, LookupError, TypeError):
        body = parse_json(body, "the body")["error"]["message"]
    return " ".join(str(body).split())[:200]


def _client(url: str, key: str | None) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(600.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
    )
