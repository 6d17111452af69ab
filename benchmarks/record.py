"""What the benchmarks share: interleaved rounds, medians, the machine, and one JSON per script in results/.

Time is processor time of one thread, which on an idle machine is wall time and on a busy one leaves out other
processes. Every contender runs in a process of its own (`alone`): oneDNN compiles bfloat16 products by shape and
caches the latest thousand, so contenders in one process evict each other's and measure mostly that.

A result is {"hardware", "note", "size", "rows"}, and most rows set Soli beside its peers, measured in the same rounds:

    {"what", "unit", "soli": spread, "peers": {name: spread and "ratio"}, "peer": name, "ratio"}

A ratio says how many times faster than the peer Soli is: Soli's median over the peer's, of the same interleaved rounds;
below 1 Soli is slower (of memory: takes more). `ratio` below is its only definition; older results, which recorded the
median of the rounds' ratios, are read with it too. `peer` names the peer that does best against Soli.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
MORE_IS_BETTER = ("tokens/s", "TFLOP/s")
EVEN = (0.95, 1.05)  # ratios that nobody should read anything into
NOTE = (
    "Processor time of one thread on a shared machine: other processes used its caches and memory too, so absolute "
    "figures vary from run to run; the ratios, measured in interleaved rounds, are what counts."
)
# Labels in results recorded before 0.2, and what they are called since.
OLD_LABELS = [
    (r"\b(\d+) at once", r"batch \1"),  # old name
    (r"beside the memory's speed", "beside memory bandwidth"),  # old name
    (r"\bas written\b", "eager"),
    (r"beside as many of", "beside 6 of"),
    (r"Time that passes", "Wall time"),  # old name
    (r"in which others took", "in which other processes took"),
    (r"is made again", "is repeated"),
    (
        r"The memory's line is reading each weight that plays once, at the speed measured beside it\.",
        "Memory bandwidth: reading each activated weight once, at the bandwidth of the same rounds.",
    ),
    (r"as released it ends with an error", "its release fails"),
    (r"Processor time of one thread, on a machine that other work shared.*counts\.", NOTE),
]

# The recorded commit is that of the tree around this file, so its soli must run, whatever else is installed.
sys.path.insert(0, str(ROOT / "src"))

from soli import machine  # noqa: E402


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with the option that every script has."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=rounds, help=f"rounds to take the median of (default {rounds})")
    return options


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """`run` as a contender of `interleaved`: its seconds of processor time."""

    def seconds() -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    return seconds


@contextmanager
def alone(
    build: Callable[..., Callable[..., Any]], *arguments: object, threads: int = 1
) -> Iterator[Callable[..., Any]]:
    """What `build(*arguments)` makes in a new process with so many threads: a function that runs there, called here.

    `build` is a module's function; arguments and answers are plain data.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, build, arguments, threads), daemon=True)
    process.start()
    there.close()

    def ask(*request: object, **more: object) -> Any:
        here.send((request, more))
        return here.recv()

    try:
        yield ask
    finally:
        here.close()
        process.join()


def _serve(
    connection: Connection, build: Callable[..., Callable[..., Any]], arguments: tuple[object, ...], threads: int
) -> None:
    import torch

    torch.set_num_threads(threads)
    run = build(*arguments)
    with suppress(EOFError):
        while True:
            request, more = connection.recv()
            connection.send(run(*request, **more))


def interleaved(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contender returned in each round: all take their turn in every round, in an order drawn anew.

    One more round goes first to warm up and is not counted.
    """
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            value = contenders[name]()
            if number:
                measured[name].append(value)
        progress(f"round {number} of {rounds}" if number else "warm-up round")
    return measured


def interleaved_values(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """As `interleaved`, for contenders that need no warming up: each round begins a process."""
    measured: dict[str, list[Any]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            measured[name].append(contender())
            progress(f"round {number + 1} of {rounds}, {name}: {measured[name][-1]}")
    return measured


def progress(message: str) -> None:
    """A progress line on stderr."""
    print(f"  {message}", file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest, to four significant digits."""
    return {
        "median": rounded(statistics.median(values)),
        "lowest": rounded(min(values)),
        "highest": rounded(max(values)),
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def row(
    what: str,
    unit: str,
    soli: Sequence[float],
    peers: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """One line of a result: Soli's values and each peer's, one per round, in `unit`."""
    measured = spread(soli)
    spreads = {name: spread(values) for name, values in (peers or {}).items()}
    compared = {name: peer | {"ratio": ratio(measured, peer, unit)} for name, peer in spreads.items()}
    best = min(compared, key=lambda name: compared[name]["ratio"], default=None)
    return {
        "what": what,
        "unit": unit,
        "soli": measured,
        "peers": compared,
        "peer": best,
        "ratio": compared[best]["ratio"] if best else None,
    }


def ratio(soli: Mapping[str, float], peer: Mapping[str, float], unit: str) -> float:
    """How many times faster (of memory: how many times smaller) Soli's median is than the peer's."""
    quotient = soli["median"] / peer["median"]
    return rounded(quotient if unit in MORE_IS_BETTER else 1 / quotient)


def duration(hours: float) -> str:
    """In minutes below two hours."""
    return f"{hours:.1f} h" if hours >= 2 else f"{60 * hours:.1f} min"


def hardware(threads: int = 1) -> dict[str, Any]:
    """The machine, the versions, the commit and the date: the head of every result.

    Where the tree is copied without its history, or with another, SOLI_COMMIT names the commit of a tree without
    changes.
    """
    processor = machine.processor()
    commit = os.environ.get("SOLI_COMMIT", "")
    return {
        "cpu": processor.name,
        "cores": processor.cores,
        "memory_gib": round(machine.memory_bytes() / 2**30, 1),
        "threads": threads,
        "python": platform.python_version(),
        "torch": machine.package_version("torch"),
        "transformers": machine.package_version("transformers"),
        "commit": commit or _git("rev-parse", "HEAD"),
        "dirty": not commit and bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/images")),
        "date": datetime.date.today().isoformat(),
    }


def _git(*arguments: str) -> str:
    """What git says about this tree; empty outside a checkout."""
    try:
        process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return process.stdout.strip()


def write(name: str, result: Mapping[str, Any]) -> Path:
    """Save a result as results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def finish(name: str, size: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Save a benchmark's rows with all that belongs to them, and print them."""
    file = write(name, {"hardware": hardware(), "note": NOTE, "size": size, "rows": rows})
    for line in rows:
        print(summary(line))
    print(f"written to {file.relative_to(ROOT)}", file=sys.stderr)


def merge(name: str, note: str, size: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], threads: int) -> Any:
    """Put rows into results/NAME.json in place of those of the same name, and return all of it. Rows of another commit,
    or of a tree with other changes, are dropped."""
    new = {row["what"] for row in rows}
    others = [row for row in earlier(name, threads) if row["what"] not in new]
    result = {"hardware": hardware(threads), "note": note, "size": size, "rows": [*others, *rows]}
    write(name, result)
    return result


def earlier(name: str, threads: int) -> list[dict[str, Any]]:
    """The rows of results/NAME.json where this commit measured them on this machine; else none."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return []
    result, machine = load(file), hardware(threads)
    same = all(result["hardware"][key] == machine[key] for key in ("commit", "dirty", "cpu", "threads"))
    return result["rows"] if same else []


def load(file: Path) -> dict[str, Any]:
    """A recorded result with the labels and the ratio of today."""
    result = json.loads(file.read_text(encoding="utf-8"))
    if "note" in result:
        result["note"] = relabelled(result["note"])
    for line in result.get("rows", []):
        if "what" in line:
            line["what"] = relabelled(line["what"])
        if line.get("peers"):
            line["peers"] = {
                relabelled(name): peer | {"ratio": ratio(line["soli"], peer, line["unit"])}
                for name, peer in line["peers"].items()
            }
            line["peer"] = min(line["peers"], key=lambda name, peers=line["peers"]: peers[name]["ratio"])
            line["ratio"] = line["peers"][line["peer"]]["ratio"]
    return result


def relabelled(label: str) -> str:
    for old, new in OLD_LABELS:
        label = re.sub(old, new, label)
    return label


def summary(line: Mapping[str, Any]) -> str:
    """One row as a line of text."""
    text = f"{line['what']}: Soli {figure(line['soli']['median'], line['unit'])}"
    for name, peer in line["peers"].items():
        text += f"; {name} {figure(peer['median'], line['unit'])} ({verdict(peer['ratio'], line['unit'])})"
    return text


def figure(value: float, unit: str) -> str:
    """A value with its unit, to three significant digits or to the whole number."""
    digits = max(0, 3 - len(str(int(abs(value))))) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}"


def wrapped(text: str, width: int = 120) -> list[str]:
    """Lines of at most `width` characters, one sentence's words after another."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def verdict(ratio: float, unit: str) -> str:
    """A ratio with the word that a loss deserves."""
    if EVEN[0] <= ratio <= EVEN[1]:
        return f"{ratio:.2f}×, even"
    return f"{ratio:.2f}×" if ratio > 1 else f"{ratio:.2f}×, {'more' if unit == 'MiB' else 'slower'}"
