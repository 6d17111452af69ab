"""Rewrite the table of what was measured from results/*.json, between its markers: README.md has the headlines and
whatever Soli loses, benchmarks/README.md every row. Nothing in a table is typed by hand.

    python benchmarks/readme_table.py            rewrite both
    python benchmarks/readme_table.py --check    exit with 1, changing nothing, when one is stale
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_rows
import record

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
# Where each result stands in the table, and the script that made it; the document of soft_to_sparse has its own table.
SCRIPTS = {
    "nano": "nano_card.py",
    "generate": "generate.py",
    "train_step": "train_step.py",
    "experts": "experts.py",
    "cpu": "cpu.py",
    "cpu_amx": "cpu.py",
    "cpu_avx2": "cpu.py",
    "serve": "serve.py",
    "serve_avx2": "serve.py",
    "speculation": "speculation.py",
    "cpu_kernels": "cpu_kernels.py",
    "open_checkpoint": "open_checkpoint.py",
    **gpu_rows.SCRIPTS,
}
# Rows of cpu.json and serve.json, elsewhere.
PROCESSORS = {"cpu_amx": "with AMX", "cpu_avx2": "with AVX2 alone", "serve_avx2": "with AVX2 alone"}
DIRECTIONS = {"en-zh": "English to Chinese", "zh-en": "Chinese to English"}
HEAD = ["| what | Soli | peer | ratio | where measured |", "|---|--:|--:|--:|---|"]


def table(results: Path, every_row: bool) -> str:
    """The table and the lines under it that say how to read it and where it was measured."""
    lines: list[str] = list(HEAD)
    machines: dict[str, list[str]] = {}  # what is said of a machine, and the results it holds for
    notes: dict[str, list[str]] = {}  # how time was taken, where it was not as everywhere
    for name, script in SCRIPTS.items():
        file = results / f"{name}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        if name in gpu_rows.SCRIPTS:
            result |= {"rows": gpu_rows.rows(name, result), "note": gpu_rows.NOTE}
        if name in PROCESSORS:
            result["rows"] = [row | {"what": f"{PROCESSORS[name]}: {row['what']}"} for row in result["rows"]]
        shown = quality(result["figures"]) if "figures" in result else speed(result["rows"], every_row)
        if not shown:
            continue
        lines += [f"| {' | '.join(cells)} | [{script}]({link(script, every_row)}) |" for cells in shown]
        if "hardware" in result:
            machines.setdefault(machine(result), []).append(name)
        if result.get("note", record.BUSY) != record.BUSY:
            notes.setdefault(result["note"], []).append(name)
    lines += [
        "",
        f"A ratio says how many times faster than the peer Soli is; below 1 Soli is slower. {record.BUSY}",
        "",
    ]
    told = [f"- {', '.join(names)}: {said}" for said, names in (*notes.items(), *machines.items())]
    return "\n".join([*lines, *told])


def link(script: str, beside: bool) -> str:
    return script if beside else f"benchmarks/{script}"


def speed(rows: Sequence[Mapping[str, Any]], every_row: bool) -> list[list[str]]:
    """The cells of a benchmark's rows: each with its best peer, or with every peer when every row is wanted."""
    cells = []
    for row in rows:
        lost = row["ratio"] is not None and row["ratio"] < record.EVEN[0] and not row.get("aside")
        if not (every_row or row["headline"] or lost):
            continue
        peers = list(row["peers"]) if every_row else [row["peer"]] if row["peer"] else []
        soli = record.figure(row["soli"]["median"], row["unit"])
        for name in peers:
            peer = row["peers"][name]
            theirs = f"{record.figure(peer['median'], row['unit'])} ({name})"
            cells.append([row["what"], soli, theirs, record.verdict(peer["ratio"], row["unit"])])
        if not peers:
            cells.append([row["what"], soli, "", ""])
    return cells


def quality(figures: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the model in the box: what its card says of it, each line only when there is a figure for it."""
    cells = []
    for key, words in DIRECTIONS.items():
        if key in figures:
            found = figures[key]
            cells.append([f"nano, {words}, held-out pairs", f"chrF {found['chrf']:.1f}, BLEU {found['bleu']:.1f}"])
    if "bits_per_byte" in figures:
        cells.append(["nano, held-out text", f"{figures['bits_per_byte']:.2f} bits per byte"])
    if figures.get("mtp_acceptance") is not None:
        cells.append(["nano, second token guessed right by MTP", f"{figures['mtp_acceptance']:.0%}"])
    if "tokens_seen" in figures and "hours" in figures:
        tokens = figures.get("tokens_run", figures["tokens_seen"])
        trained = f"{tokens / 1e6:.1f} M tokens, {record.duration(figures['hours'])}"
        cells.append(["nano, training", trained])
    return [[*cell, "", ""] for cell in cells]


def machine(result: Mapping[str, Any]) -> str:
    """A line about a result's machine, versions, commit and day."""
    of = result["hardware"]
    if of.get("gpu"):
        return f"one {of['gpu']}; torch {of['torch']} for CUDA {of['cuda']}; {of['date']}, commit {of['commit'][:7]}."
    commit = of["commit"][:7] + (", with changes not committed" if of["dirty"] else "")
    counts = sorted({row.get("rounds", result["size"]["rounds"]) for row in result["rows"]}) if "size" in result else []
    rounds = f"; medians of {' or '.join(map(str, counts))} interleaved rounds" if counts else ""
    return (
        f"{of['cpu']}, {of['threads']} of {of['cores']} cores, {of['memory_gib']} GiB; torch {of['torch']}, "
        f"transformers {of['transformers']}; {of['date']}, commit {commit}{rounds}."
    )


def with_table(text: str, made: str, file: Path) -> str:
    """`text` with what stands between its markers replaced. Ends the run when the markers are not there once each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        sys.exit(f"{file}: needs the line {BEGIN} and after it the line {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when a table is stale")
    parser.add_argument("--readme", type=Path, default=record.ROOT / "README.md", help="gets the headlines")
    parser.add_argument("--full", type=Path, default=record.HERE / "README.md", help="gets every row")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="where the JSON files are")
    arguments = parser.parse_args(argv)
    stale = False
    for file, every_row in ((arguments.readme, False), (arguments.full, True)):
        if not file.exists():
            sys.exit(f"{file}: there is no such file; write it with the lines {BEGIN} and {END}")
        text = file.read_text(encoding="utf-8")
        fresh = with_table(text, table(arguments.results, every_row), file)
        if fresh != text and arguments.check:
            print(f"{file} is stale: run python benchmarks/readme_table.py", file=sys.stderr)
            stale = True
        elif fresh != text:
            file.write_text(fresh, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
