"""Models larger than memory: experts read from disk, beside the disk's own bandwidth and the run that is all in memory.

    python benchmarks/paging.py LAB int4 --share 25 50 75 100 [--prefetch auto] [--rounds 3]
    python benchmarks/paging.py LAB fp8 --shape v3-layers --gb 4 8 16 --no-resident

Writes LAB/models/SHAPE-FORMAT-pack, unless it is there: by default the shape of Moonlight-16B-A3B with random weights
(int4 9 GB, fp8 16 GB, bf16 32 GB), or two of DeepSeek-V3's layers (fp8 23 GB). It measures for each share of its
experts in memory: tokens per second of decoding, seconds to the first token of a prompt of 512, bytes read per token,
and the share of the disk's bandwidth. That is measured in the same round, before and after: random experts of the same
files, read by the same reader. Files are read past the page cache (direct I/O), so nothing is warm but the cache of
experts. Random weights route nearly uniformly: hits are about the share in memory.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models
import record
import torch

from soli.checkpoint import load_model
from soli.checkpoint.writer import Target
from soli.data.tokenizer import Tokenizer
from soli.engine.engine import Engine
from soli.engine.offline import limits_for, stream
from soli.engine.request import Request
from soli.engine.sampler import SamplingParams
from soli.engine.text_model import text_model
from soli.experts.load import load_paged_model
from soli.experts.policy import DEFAULT
from soli.experts.store import ExpertStore
from soli.model import Transformer

PROMPT = int(os.environ.get("PROMPT", "512"))
NEW_TOKENS = 48
WARM_TOKENS = 16  # before decoding is measured
DISK_EXPERTS, DISK_BYTES = 64, 10**9  # read at least to measure the disk's bandwidth
SINGLE_READS = 16
NOTE = (
    "Wall time of all processors. Cold: the cache of experts is empty when the prompt comes, and decoding is measured "
    "after the prompt and some tokens. Files are read past the page cache. Disk bandwidth is the mean of a measurement "
    "before and one after, in each round; its latency is what an expert that is read alone takes longer."
)


def main() -> None:
    options = record.parser(__doc__, rounds=3)
    options.add_argument("lab", type=Path)
    options.add_argument("format", choices=("int4", "int8", "fp8", "bf16"))
    options.add_argument("--shape", choices=("large", "v3-layers"), default="large")
    options.add_argument("--share", type=float, nargs="+", default=[25, 50, 75, 100], help="percent of the experts")
    options.add_argument("--gb", type=float, nargs="+", help="GB of experts, in place of shares")
    options.add_argument("--no-resident", action="store_true", help="the model does not fit in memory")
    options.add_argument("--prefetch", choices=("auto", "on", "off"), default="auto")
    options.add_argument("--policy", default=DEFAULT)
    options.add_argument("--tokens", type=int, default=NEW_TOKENS)
    options.add_argument("--output", help="name of the JSON in results/")
    arguments = options.parse_args()
    folder = arguments.lab / "models" / f"{arguments.shape}-{arguments.format}-pack"
    config = models.config(arguments.shape)
    if not folder.exists():
        models.write_random(folder, config, Target(arguments.format), pack=True)
    experts = config.n_routed_experts * config.num_moe_layers
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    shares = [100 * 1e9 * gb / size for gb in arguments.gb] if arguments.gb else arguments.share
    contenders: dict[str, Callable[[], dict[str, float]]] = {
        f"{share:.0f} %": partial(
            alone, paged, folder, round(share / 100 * experts), arguments.prefetch, arguments.policy, arguments.tokens
        )
        for share in shares
    }
    if not arguments.no_resident:
        contenders["resident"] = partial(alone, in_memory, folder, arguments.tokens)
    rounds = record.interleaved_values(contenders, arguments.rounds)
    rows = [{"experts in memory": name, **spreads(values)} for name, values in rounds.items()]
    for row in rows:
        print({name: value["median"] if isinstance(value, dict) else value for name, value in row.items()})
    if arguments.output:
        size_of_run = {"shape": arguments.shape, "format": arguments.format, "prompt": PROMPT, "bytes": size}
        hardware = record.hardware(os.cpu_count() or 1)
        record.write(arguments.output, {"hardware": hardware, "note": NOTE, "size": size_of_run, "rows": rows})


def spreads(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each value over the rounds."""
    return {name: record.spread([one[name] for one in rounds]) for name in rounds[0]}


def alone(build: Callable[..., Callable[[], dict[str, float]]], *options: object) -> dict[str, float]:
    """What a contender measures, in a process of its own."""
    with record.alone(build, *options, threads=os.cpu_count() or 1) as measure:
        return measure()


def paged(*options: Any) -> Callable[[], dict[str, float]]:
    """Experts from disk, as a contender."""
    return lambda: measure(*options)


def in_memory(*options: Any) -> Callable[[], dict[str, float]]:
    """All weights in memory, as a contender."""
    return lambda: measure_resident(*options)


def measure(folder: Path, slots: int, prefetch: str, policy: str, tokens: int) -> dict[str, float]:
    """One round with so many experts in memory."""
    model, store = load_paged_model(folder, slots, prefetch=prefetch, policy=policy)
    before = measure_disk(store)
    if store.holds_all:
        warm_all(store)
    reads = store.reader.stats
    bytes_before, busy_before = reads.bytes, reads.busy_seconds
    prompt_seconds, decode_seconds, decode_bytes = run(model, folder, tokens, store)
    stats = store.stats
    read = reads.bytes - bytes_before
    busy_seconds = reads.busy_seconds - busy_before
    disk, latency = (statistics.mean(values) for values in zip(before, measure_disk(store), strict=True))
    result = {
        "disk GB/s": disk / 1e9,
        "disk latency ms": latency * 1e3,
        "tokens/s": tokens / decode_seconds,
        "first token s": prompt_seconds,
        "MB per token": decode_bytes / tokens / 1e6,
        "of disk bandwidth": decode_bytes / decode_seconds / disk,
        "GB in all": read / 1e9,
        "GB/s while reading": read / max(1e-9, busy_seconds) / 1e9,
        "hits": stats.hits / max(1, stats.hits + stats.misses),
        "precision": store.prefetcher.stats.precision,
        "guessed": store.prefetcher.stats.guessed,
        "prefetch": store.prefetcher.stats.enabled,
    }
    return {name: float(value) for name, value in result.items()}


def measure_resident(folder: Path, tokens: int) -> dict[str, float]:
    """The same with all weights mapped, after every page has been read."""
    model = load_model(folder, quantized=True, in_place=True, mtp=False)
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as data:
            while data.read(2**24):
                pass
    prompt_seconds, decode_seconds, _ = run(model, folder, tokens, None)
    return {"tokens/s": tokens / decode_seconds, "first token s": prompt_seconds}


def run(model: Transformer, folder: Path, tokens: int, store: ExpertStore | None) -> tuple[float, float, int]:
    """Seconds to the first token of a prompt, seconds of `tokens` after some, and the bytes read in these."""
    together = text_model(model, Tokenizer.from_folder(folder))
    engine = Engine(together, limits_for(together, 1, PROMPT + WARM_TOKENS + tokens + 8))
    generator = torch.Generator().manual_seed(random.randrange(10**6))
    ids = torch.randint(2, model.config.vocab_size, (PROMPT,), generator=generator).tolist()
    start = time.perf_counter()
    first = begin = 0.0
    bytes_before = 0
    # Tokens at random: the likeliest of random weights repeat, and so would their experts.
    sampling = SamplingParams(temperature=100.0, seed=random.randrange(10**6))
    for number, _ in enumerate(stream(engine, Request(tuple(ids), WARM_TOKENS + tokens + 1, sampling))):
        now = time.perf_counter()
        if number == 0:
            first = now - start
        if number == WARM_TOKENS:
            begin, bytes_before = now, store.reader.stats.bytes if store else 0
        if number == WARM_TOKENS + tokens:
            return first, now - begin, (store.reader.stats.bytes if store else 0) - bytes_before
    raise RuntimeError("the answer ended early")


def measure_disk(store: ExpertStore) -> tuple[float, float]:
    """Bytes per second of reading random experts, as many at a time as the reader takes, and the seconds that one which
    is read alone takes longer."""
    count = max(DISK_EXPERTS, DISK_BYTES // store.slot_bytes)
    size = store.sources.layers[0].expert_bytes
    rate = count * size / seconds_of_reading(store, count)
    alone = statistics.median(seconds_of_reading(store, 1) for _ in range(SINGLE_READS))
    return rate, max(0.0, alone - size / rate)


def seconds_of_reading(store: ExpertStore, count: int) -> float:
    """Random experts, all submitted at once."""
    layers = store.sources.layers
    chosen = [random.choice(random.choice(layers).experts) for _ in range(count)]
    arrived = threading.Semaphore(0)
    start = time.perf_counter()
    for number, expert in enumerate(chosen):
        slot = store.memory.view(number % min(16, store.capacity))
        store.reader.submit(expert.reads, slot, lambda _: arrived.release())
    for _ in chosen:
        arrived.acquire()
    return time.perf_counter() - start


def warm_all(store: ExpertStore) -> None:
    """Every expert in memory."""
    for layer, source in enumerate(store.sources.layers):
        for _ in store.windows(layer, range(len(source.experts)), wait=True):
            pass


if __name__ == "__main__":
    main()
