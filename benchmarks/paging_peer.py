"""Decoding with less memory than the model takes: Soli and llama.cpp, both under the same limit of a memory cgroup.

    python benchmarks/paging_peer.py LAB int4 q4_0 --limit 4GB 6GB [--rounds 3] [--output NAME]

LAB/models/large-FORMAT-pack and large-QUANT.gguf, the shape of Moonlight-16B-A3B with random weights, are written by
paging.py and models.py. Each contender runs in a process of its own, in a cgroup (v1 or v2) of `--limit` bytes; what
the page cache holds of its files is dropped before, and counted against the limit after. Soli is given the limit less
what Python and its libraries take. llama.cpp (llama-cpp-python) maps the file, which is what it does by default,
without its repacked copies of weights, which the limit has no room for. Prompts and decoded tokens are random: the
likeliest of random weights repeat, and so would their experts. `--limit none` sets no limit, for a model that is larger
than the machine.

    python benchmarks/paging_peer.py LAB bf16 bf16 --limit none --one-by-one

--one-by-one takes the disk of one model: each contender's files are written before its rounds and removed after them.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import models
import record

from soli.checkpoint.writer import Target
from soli.quantities import parse_bytes

PROMPT = int(os.environ.get("PROMPT", "64"))
WARM_TOKENS, NEW_TOKENS = 2, 8
MARGIN = 150 * 10**6  # bytes of a limit that Soli leaves to its libraries' growth
CGROUPS = Path("/sys/fs/cgroup")
THREADS = os.cpu_count() or 1


def main() -> None:
    options = record.parser(__doc__, rounds=3)
    options.add_argument("lab", type=Path)
    options.add_argument("format")
    options.add_argument("quant", help="of the GGUF file; - leaves llama.cpp out")
    options.add_argument("--limit", nargs="+", required=True)
    options.add_argument("--one-by-one", action="store_true", help="write, measure and remove one model at a time")
    options.add_argument("--output", help="name of the JSON in results/")
    arguments = options.parse_args()
    folder = arguments.lab / "models" / f"large-{arguments.format}-pack"
    file = arguments.lab / "models" / f"large-{arguments.quant}.gguf"
    rows = []
    for limit in arguments.limit:
        size = 0 if limit == "none" else parse_bytes(limit, "--limit")
        contenders: dict[str, Callable[[], Any]] = {"soli": partial(alone, soli, folder, size)}
        if arguments.quant != "-":
            contenders["llama.cpp"] = partial(alone, llama_cpp, file, size)
        if arguments.one_by_one:
            rounds = one_by_one(contenders, {"soli": folder, "llama.cpp": file}, arguments)
        else:
            rounds = record.interleaved_values(contenders, arguments.rounds)
        for what, unit in (("decode", "tokens/s"), ("first token", "s")):
            peers = {name: [one[what] for one in values] for name, values in rounds.items() if name != "soli"}
            name = f"{what}, {limit} of memory"
            rows.append(record.row(name, unit, [one[what] for one in rounds["soli"]], peers))
            print(record.summary(rows[-1]), flush=True)
    if arguments.output:
        note = "Wall time of all processors; both under the same memory limit, with an empty page cache at the start."
        if arguments.one_by_one:
            note += " The disk holds one of the models: contenders are measured one after the other."
        size_of_run = {"soli": arguments.format, "llama.cpp": arguments.quant, "prompt": PROMPT, "new": NEW_TOKENS}
        hardware = record.hardware(THREADS)
        record.write(arguments.output, {"hardware": hardware, "note": note, "size": size_of_run, "rows": rows})


def one_by_one(
    contenders: Mapping[str, Callable[[], Any]], paths: Mapping[str, Path], arguments: Any
) -> dict[str, list[Any]]:
    """The rounds of each contender, whose model is on the disk only meanwhile."""
    rounds: dict[str, list[Any]] = {}
    for name, contender in contenders.items():
        path = paths[name]
        record.progress(f"{name}: writing {path}")
        write_model(path, arguments)
        try:
            rounds |= record.interleaved_values({name: contender}, arguments.rounds)
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return rounds


def write_model(path: Path, arguments: Any) -> None:
    """Random weights of the large shape, as a pack or as a GGUF file."""
    if path.suffix == ".gguf":
        import gguf_file

        gguf_file.write_gguf(path, models.config("large"), None, arguments.quant)
    else:
        models.write_random(path, models.config("large"), Target(arguments.format), pack=True)


def alone(build: Callable[..., Callable[[], dict[str, float]]], path: Path, limit: int) -> dict[str, float]:
    """What a contender measures in a process of its own, in a cgroup."""
    with limited(limit) as cgroup, record.alone(build, path, limit, cgroup, threads=THREADS) as measure:
        return measure()


@contextlib.contextmanager
def limited(limit: int) -> Iterator[str | None]:
    """The folder of a new memory cgroup; None without a limit."""
    if not limit:
        yield None
        return
    first = (CGROUPS / "memory").is_dir()
    folder = (CGROUPS / "memory" if first else CGROUPS) / f"soli-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        yield str(folder)
    finally:
        time.sleep(1)  # the process has ended just now
        folder.rmdir()


def enter(cgroup: str | None, path: Path) -> None:
    """What this process allocates and reads from now on is counted, and nothing of the model is in memory."""
    for file in path.glob("*") if path.is_dir() else [path]:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cgroup is not None:
        (Path(cgroup) / "cgroup.procs").write_text(str(os.getpid()))


def tokens(count: int) -> list[int]:
    """Random ones, new in every process."""
    generator = random.Random()
    return [generator.randrange(2, models.config("large").vocab_size) for _ in range(count)]


def soli(folder: Path, limit: int, cgroup: str | None) -> Callable[[], dict[str, float]]:
    """Through the engine; at a temperature of 100 tokens are drawn nearly evenly."""
    from soli.engine.engine import Engine
    from soli.engine.offline import limits_for, stream
    from soli.engine.request import Request
    from soli.engine.sampler import SamplingParams
    from soli.engine.text_model import open_text_model
    from soli.machine import resident_memory

    enter(cgroup, folder)
    memory = limit - resident_memory() - MARGIN if limit else None
    text_model = open_text_model(str(folder), dtype="as-is", memory=memory)
    engine = Engine(text_model, limits_for(text_model, 1, PROMPT + WARM_TOKENS + NEW_TOKENS + 8))

    def measure() -> dict[str, float]:
        sampling = SamplingParams(temperature=100.0, seed=random.randrange(10**6))
        times = []
        start = time.perf_counter()
        for event in stream(engine, Request(tuple(tokens(PROMPT)), WARM_TOKENS + NEW_TOKENS + 1, sampling)):
            if event.token is not None:
                times.append(time.perf_counter() - start)
        return {"first token": times[0], "decode": NEW_TOKENS / (times[-1] - times[WARM_TOKENS])}

    return measure


def llama_cpp(file: Path, limit: int, cgroup: str | None) -> Callable[[], dict[str, float]]:
    """Through llama-cpp-python, without the repacked copies of weights that it makes by default where it can: they are
    no part of the mapped file, and with them it is ended by the limit."""
    from llama_cpp import Llama, llama_cpp

    default = llama_cpp.llama_model_default_params

    def without_copies() -> Any:
        parameters = default()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_model_default_params = without_copies
    enter(cgroup, file)
    context = PROMPT + WARM_TOKENS + NEW_TOKENS + 8
    llama = Llama(str(file), n_ctx=context, n_batch=PROMPT, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def measure() -> dict[str, float]:
        times = []
        start = time.perf_counter()
        llama.eval(tokens(PROMPT))
        times.append(time.perf_counter() - start)
        record.progress(f"llama.cpp: prompt {times[0]:.1f} s")
        for token in tokens(WARM_TOKENS + NEW_TOKENS):
            llama.eval([token])
            times.append(time.perf_counter() - start)
        return {"first token": times[0], "decode": NEW_TOKENS / (times[-1] - times[WARM_TOKENS])}

    return measure


if __name__ == "__main__":
    main()
