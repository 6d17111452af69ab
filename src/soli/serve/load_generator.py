"""Load on a server from outside: requests that arrive at random, and when each of their pieces of text came.

Arrivals are Poisson: the gaps between them are exponential with mean 1 / rate, drawn from a seed. The load is open: a
request is sent when it is due, however many are under way. Its times count from that moment, so waiting anywhere is
part of them. Speaks OpenAI's /v1/completions with streaming, so any server that does can be measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import numpy as np

from soli.errors import SoliError

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work night point home water room mother area money story "
    "fact month lot right study book eye job word business issue side kind head house service friend father power"
)
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Load:
    """What is sent at each rate: `requests` for each of `seeds`, of about `prompt_words` tokens or more, for at most
    `new_tokens` each, likeliest tokens only. What ends earlier, on servers without `ignore_eos`, counts as it is."""

    requests: int = 32
    seeds: Sequence[int] = (0,)
    prompt_words: int = 64
    new_tokens: int = 64


@dataclass
class Timing:
    """One request: seconds from when it was due to each piece of text and to its end; `error` where there was none."""

    pieces: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Server:
    """Where to send what: base address, model name, API key; `full_length`: it takes `ignore_eos`, so every answer has
    all the tokens that were asked for."""

    url: str
    model: str
    key: str | None = None
    full_length: bool = False


async def find_server(url: str, key: str | None) -> Server:
    """The server's first model, and whether it takes `ignore_eos`; SoliError when there is no server of this kind."""
    try:
        async with _client(url, key) as client:
            answer = await client.get("/v1/models")
            if answer.status_code != 200:
                raise SoliError(f"{url} answers /v1/models with status {answer.status_code}: {_said(answer.text)}")
            model = str(answer.json()["data"][0]["id"])
            probe = {"model": model, "prompt": "time", "max_tokens": 1, "ignore_eos": True}
            taken = await client.post("/v1/completions", json=probe)
            return Server(url, model, key, taken.status_code == 200)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise SoliError(f"{url} is no OpenAI-compatible server ({error}): give its address without /v1") from error


async def measure(
    server: Server, rate: float, load: Load, on_end: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """One row of figures for one arrival rate, in requests per second; math.inf sends all at once."""
    timings: list[Timing] = []
    seconds = 0.0
    for seed in load.seeds:
        draw = random.Random(seed)
        due = arrivals(rate, load.requests, draw)
        prompts = [" ".join(draw.choices(WORDS.split(), k=load.prompt_words)) for _ in due]
        async with _client(server.url, server.key) as client:
            start = time.perf_counter()

            async def one(at: float, prompt: str, client: httpx.AsyncClient = client, start: float = start) -> Timing:
                await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
                timing = await _timed(client, _body(server, prompt, load.new_tokens), start + at)
                on_end(1)
                return timing

            timings += await asyncio.gather(*(one(at, prompt) for at, prompt in zip(due, prompts, strict=True)))
            seconds += time.perf_counter() - start
    return {"rate": rate if math.isfinite(rate) else None, **figures(timings, seconds)}


def arrivals(rate: float, count: int, draw: random.Random) -> list[float]:
    """Seconds from the start at which `count` requests are due, the first at once."""
    at, found = 0.0, []
    for _ in range(count):
        found.append(at)
        at += draw.expovariate(rate) if math.isfinite(rate) else 0.0
    return found


def figures(timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
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
        "between": _percentiles([later - one for timing in good for one, later in pairwise(timing.pieces)]),
        "whole": _percentiles([timing.end for timing in good]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = np.percentile(np.asarray(seconds) * 1000.0, PERCENTILES)
    return {f"p{percent}": float(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def _body(server: Server, prompt: str, new_tokens: int) -> dict[str, Any]:
    body = {"model": server.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    return body | {"stream_options": {"include_usage": True}} | ({"ignore_eos": True} if server.full_length else {})


async def _timed(client: httpx.AsyncClient, body: dict[str, Any], due: float) -> Timing:
    timing = Timing()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                timing.error = f"status {answer.status_code}: {_said(answer.text)}"
                return timing
            ended = False
            async for line in answer.aiter_lines():
                ended = ended or line == "data: [DONE]"
                if line.startswith("data: {"):
                    _note(json.loads(line[6:]), timing, time.perf_counter() - due)
            timing.end = time.perf_counter() - due
            if not ended and timing.error is None:
                timing.error = "the stream broke off"
    except (httpx.HTTPError, ValueError) as error:
        timing.error = f"{type(error).__name__}: {_said(str(error))}"
    return timing


def _note(chunk: dict[str, Any], timing: Timing, at: float) -> None:
    """What one event of the stream says."""
    if "error" in chunk:
        timing.error = _said(json.dumps(chunk))
    if any(choice.get("text") for choice in chunk.get("choices") or ()):
        timing.pieces.append(at)
    if usage := chunk.get("usage"):
        timing.prompt_tokens, timing.tokens = usage["prompt_tokens"], usage["completion_tokens"]


def _said(body: str) -> str:
    """The message of an error's body, in a bearable length."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        body = json.loads(body)["error"]["message"]
    return " ".join(str(body).split())[:200]


def _client(url: str, key: str | None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=httpx.Timeout(600.0), limits=limits)
