"""`soli serve --memory` with half of the experts in memory: 1, 4 and 16 clients at a time, and the texts of one alone.

    python benchmarks/paging_serve.py LAB int4 --memory 5GB [--clients 1 4 16] [--rounds 3] [--output NAME]

LAB/models/large-FORMAT-pack is written by paging.py. Each client sends one request after another; prompts are random
tokens, answers are sampled with a seed of their own. All numbers of clients send the same requests, and every answer
must be the one that a client alone got, to the last digit of its tokens' log-probabilities. Tokens per second are of
all clients together, prompts not counted; bytes are those that the server's /metrics says were read.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import models
import record
from llama_server import free_port

REQUESTS, PROMPT, NEW_TOKENS = 16, 8, 12
PATIENCE = 300.0  # seconds for one request, and to load


def main() -> None:
    options = record.parser(__doc__, rounds=3)
    options.add_argument("lab", type=Path)
    options.add_argument("format")
    options.add_argument("--memory", required=True)
    options.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    options.add_argument("--output", help="name of the JSON in results/")
    arguments = options.parse_args()
    folder = arguments.lab / "models" / f"large-{arguments.format}-pack"
    alone: list[Any] = []
    rounds: dict[int, list[dict[str, float]]] = {clients: [] for clients in arguments.clients}
    with server(folder, arguments.memory) as client:
        for number in range(arguments.rounds + 1):  # the first fills the cache of experts
            for clients in arguments.clients if number else arguments.clients[:1]:
                answers, result = run(client, clients)
                alone = alone or answers
                result["as alone"] = sum(one == other for one, other in zip(answers, alone, strict=True)) / REQUESTS
                record.progress(f"round {number}, {clients} clients: {result}")
                if number:
                    rounds[clients].append(result)
    rows = [
        {"clients": clients} | {name: record.spread([one[name] for one in results]) for name in results[0]}
        for clients, results in rounds.items()
    ]
    for row in rows:
        print({name: value["median"] if isinstance(value, dict) else value for name, value in row.items()})
    if arguments.output:
        size = {"format": arguments.format, "memory": arguments.memory, "prompt": PROMPT, "new": NEW_TOKENS}
        record.write(arguments.output, {"hardware": record.hardware(2), "size": size, "rows": rows})


@contextmanager
def server(folder: Path, memory: str) -> Iterator[httpx.Client]:
    """A client of `soli serve`, once it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "soli", "serve", str(folder), "--memory", memory, "--port", str(port)]
    with subprocess.Popen([*command, "--log-level", "warning"]) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
                end = time.monotonic() + PATIENCE
                while not is_ready(client):
                    if process.poll() is not None or time.monotonic() > end:
                        raise RuntimeError("the server did not start")
                    time.sleep(0.5)
                yield client
        finally:
            process.terminate()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def run(client: httpx.Client, clients: int) -> tuple[list[Any], dict[str, float]]:
    """Answers to REQUESTS requests, `clients` at a time, and what they took."""
    before, start = metrics(client), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda number: answer(client, number), range(REQUESTS)))
    seconds, after = time.perf_counter() - start, metrics(client)
    grown = {name: after[name] - before[name] for name in before}
    return answers, {
        "tokens/s": grown["completion_tokens"] / seconds,
        "MB read per token": grown["expert_read_bytes"] / grown["completion_tokens"] / 1e6,
        "hits": grown["expert_cache_hits"] / (grown["expert_cache_hits"] + grown["expert_cache_misses"]),
        "waited": grown["expert_wait_seconds"] / grown["step_seconds"],
    }


def answer(client: httpx.Client, number: int) -> Any:
    """Text and log-probabilities of one request."""
    generator = random.Random(number)
    ids = [generator.randrange(2, models.config("large").vocab_size) for _ in range(PROMPT)]
    request = {"prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 2, "seed": number, "logprobs": 0}
    response = client.post("/v1/completions", json=request | {"ignore_eos": True})
    response.raise_for_status()
    choice = response.json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def metrics(client: httpx.Client) -> dict[str, float]:
    """The counters of /metrics."""
    return {
        name: float(value)
        for name, value in re.findall(r"^soli_(\w+)_total (\S+)$", client.get("/metrics").text, re.MULTILINE)
    }


if __name__ == "__main__":
    main()
