"""Write the tables of what was measured from results/*.json, between their markers: README.md gets the headlines,
benchmarks/README.md every row with its conditions. Nothing in a table is typed by hand.

    python benchmarks/readme_table.py            rewrite both
    python benchmarks/readme_table.py --check    exit with 1, changing nothing, when one is stale

A headline is one claim, measured in at least three rounds on a tree without uncommitted changes; another ends the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_rows
import record

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
LEAST_ROUNDS = 3
DISTURBED = 0.055  # share of the machine that other processes took, worth mentioning


class Section(NamedTuple):
    """A result file in benchmarks/README.md: its heading, and the script that writes the file."""

    title: str
    script: str


SECTIONS = {
    "nano": Section("Quality of the bundled model", "nano_card.py"),
    "generate": Section("Generation beside transformers", "generate.py"),
    "train_step": Section("Training steps beside transformers", "train_step.py"),
    "experts": Section("One layer's experts, forward and backward", "experts.py"),
    "cpu": Section("A CPU with AVX-512", "cpu.py"),
    "cpu_amx": Section("A CPU with AMX", "cpu.py"),
    "cpu_avx2": Section("A CPU with AVX2 alone", "cpu.py"),
    "serve": Section("Under load, AVX-512", "serve.py"),
    "serve_avx2": Section("Under load, AVX2 alone", "serve.py"),
    "speculation": Section("Drafts by the MTP module", "speculation.py"),
    "cpu_kernels": Section("One token through a layer's experts, AVX-512", "cpu_kernels.py"),
    "sparse_attention": Section("Sparse attention of DeepSeek-V3.2, one decode token", "sparse_attention.py"),
    "open_checkpoint": Section("Opening DeepSeek-V3, and start-up", "open_checkpoint.py"),
    "gpu_train_speed_1b": Section("Training on a GPU", "gpu/train_speed.py"),
    "gpu_nano_speed": Section("Training nano on a GPU", "gpu/nano_speed.py"),
    "gpu_v3_layers": Section("DeepSeek-V3's layers on a GPU", "gpu/v3_layers.py"),
    "gpu_kernels": Section("Kernels on a GPU", "gpu/kernels.py"),
}


class Headline(NamedTuple):
    """A row of README.md: a row of a result, what to call it there, and the peer that it is compared with."""

    result: str
    row: str
    label: str
    peer: str


HEADLINES = (
    Headline("generate", "decode, nano, bfloat16, batch 1", "decode, 17 M, bf16", "transformers batched_mm"),
    Headline(
        "generate", "decode, nano, bfloat16, batch 16", "decode, 17 M, bf16, batch 16",
        "transformers grouped_mm",
    ),
    Headline(
        "train_step", "training step, nano, bf16 over fp32 masters, 16 x 256 tokens",
        "training step, 17 M, bf16", "transformers eager",
    ),
    Headline("cpu_avx2", "decode, small (1.2 B), int8", "decode, 1.2 B, int8, AVX2", "llama.cpp q8_0"),
    Headline("cpu_avx2", "prefill, small (1.2 B), int4", "prefill, 1.2 B, int4, AVX2", "llama.cpp q4_0"),
    Headline("cpu_amx", "prefill, small (1.2 B), bf16", "prefill, 1.2 B, bf16, AMX", "vLLM bf16"),
    Headline(
        "cpu_kernels", "experts of one layer, one token, int4 (D 1024, F 512, E 64, K 6)",
        "a layer's experts, one token, int4, AVX-512", "memory",
    ),
    Headline(
        "gpu_train_speed_1b", "training step, 0.9 B, 0.2 B activated, bf16, 16 x 1,024 tokens (13 % of 989 TFLOP/s)",
        "training step, 0.9 B, bf16, H100", "transformers grouped_mm",
    ),
)  # fmt: skip
PEERS = {"memory": "memory bandwidth"}
DIRECTIONS = {"en-zh": "English to Chinese", "zh-en": "Chinese to English"}
RATIO = (
    "Ratio: Soli's median over the peer's, of the same interleaved rounds, as speeds; below 1 Soli is slower "
    "(of memory: takes more)."
)
Row = Mapping[str, Any]
Result = Mapping[str, Any]


def load_results(folder: Path) -> dict[str, Result]:
    """The results that are there, in the order of SECTIONS, those of GPUs as rows too."""
    results = {}
    for name in SECTIONS:
        file = folder / f"{name}.json"
        if file.exists():
            result = record.load(file)
            if name in gpu_rows.NAMES:
                result |= {"rows": gpu_rows.rows(name, result), "note": gpu_rows.NOTE}
            results[name] = result
    return results


def rounds(result: Result, row: Row) -> int | None:
    """Rounds of a row's median; None where a script repeats in a way of its own."""
    return row.get("rounds", result.get("size", {}).get("rounds"))


def headlines(results: Mapping[str, Result]) -> str:
    """README.md's table, from those of HEADLINES whose result is there."""
    lines = ["| what | Soli | peer | ratio |", "|---|--:|--:|--:|"]
    for headline in HEADLINES:
        if headline.result in results:
            result = results[headline.result]
            row = next((row for row in result["rows"] if row["what"] == headline.row), None)
            if row is None or headline.peer not in row["peers"]:
                sys.exit(f"{headline.result}.json: no row {headline.row!r} beside {headline.peer}")
            if result["hardware"].get("dirty"):
                sys.exit(f"{headline.result}.json: measured on a tree with uncommitted changes; no headline")
            if (rounds(result, row) or LEAST_ROUNDS) < LEAST_ROUNDS:
                sys.exit(f"{headline.result}.json: {headline.row!r} has fewer than {LEAST_ROUNDS} rounds; no headline")
            peer = row["peers"][headline.peer]
            cells = (
                f"[{headline.label}](benchmarks/README.md#{anchor(SECTIONS[headline.result].title)})",
                record.figure(row["soli"]["median"], row["unit"]),
                f"{record.figure(peer['median'], row['unit'])} ({PEERS.get(headline.peer, headline.peer)})",
                record.verdict(peer["ratio"], row["unit"]),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def anchor(title: str) -> str:
    """A heading's anchor on GitHub."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")


def every_row(results: Mapping[str, Result]) -> str:
    """benchmarks/README.md's sections: heading, conditions, rows."""
    lines = record.wrapped(RATIO)
    for name, result in results.items():
        section = SECTIONS[name]
        lines += ["", f"### {section.title}", "", f"[{section.script}]({section.script}), `results/{name}.json`."]
        lines += record.wrapped(conditions(result))
        cells = quality(result["figures"]) if "figures" in result else list(speed(result))
        head = ["what", "Soli"] if "figures" in result else ["what", "Soli", "peer", "ratio"]
        lines += ["", f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(lines)


def conditions(result: Result) -> str:
    """Machine, versions, commit, day, rounds and how time was taken."""
    of = result["hardware"]
    dirty = ", **with uncommitted changes**" if of.get("dirty") else ""
    if of.get("gpu"):
        machine = f"One {of['gpu']}; torch {of['torch']} for CUDA {of['cuda']}"
        return f"{machine}; {of['date']}, commit {of['commit'][:7]}. {result['note']}"
    counts = sorted({count for row in result.get("rows", []) if (count := rounds(result, row))})
    measured = f"; medians of {' or '.join(map(str, counts))} interleaved rounds" if counts else ""
    share = max((row.get("others") or 0.0 for row in result.get("rows", [])), default=0.0)
    others = f" Other processes took up to {share:.0%} of the machine." if share > DISTURBED else ""
    machine = (
        f"{of['cpu']}, {of['threads']} of {of['cores']} cores, {of['memory_gib']} GiB; torch {of['torch']}, "
        f"transformers {of['transformers']}; {of['date']}, commit {of['commit'][:7]}{dirty}{measured}."
    )
    return f"{machine} {result.get('note', '')}".strip() + others


def speed(result: Result) -> Iterator[list[str]]:
    """The cells of a benchmark's rows, each beside every peer. A median of a single round is marked."""
    for row in result["rows"]:
        what = row["what"] + (" (one round)" if rounds(result, row) == 1 else "")
        soli = record.figure(row["soli"]["median"], row["unit"])
        for name, peer in row["peers"].items():
            theirs = f"{record.figure(peer['median'], row['unit'])} ({PEERS.get(name, name)})"
            yield [what, soli, theirs, record.verdict(peer["ratio"], row["unit"])]
        if not row["peers"]:
            yield [what, soli, "", ""]


def quality(figures: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the bundled model: each only where there is a figure for it."""
    cells = []
    for key, direction in DIRECTIONS.items():
        if key in figures:
            scores = figures[key]
            cells.append([f"{direction}, held-out pairs", f"chrF {scores['chrf']:.1f}, BLEU {scores['bleu']:.1f}"])
    if "bits_per_byte" in figures:
        cells.append(["held-out text", f"{figures['bits_per_byte']:.2f} bits per byte"])
    if figures.get("mtp_acceptance") is not None:
        cells.append(["second token predicted by MTP as by the model", f"{figures['mtp_acceptance']:.0%}"])
    if "tokens_seen" in figures and "hours" in figures:
        tokens = figures.get("tokens_run", figures["tokens_seen"])
        cells.append(["training", f"{tokens / 1e6:.1f} M tokens, {record.duration(figures['hours'])}"])
    return cells


def with_table(text: str, table: str, file: Path) -> str:
    """`text` with the part between its markers replaced. Ends the run unless each marker is there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        sys.exit(f"{file}: needs the line {BEGIN} and after it the line {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when a table is stale")
    parser.add_argument("--readme", type=Path, default=record.ROOT / "README.md", help="gets the headlines")
    parser.add_argument("--full", type=Path, default=record.HERE / "README.md", help="gets every row")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="where the JSON files are")
    arguments = parser.parse_args(argv)
    results = load_results(arguments.results)
    stale = False
    for file, table in ((arguments.readme, headlines(results)), (arguments.full, every_row(results))):
        if not file.exists():
            sys.exit(f"{file}: there is no such file; write it with the lines {BEGIN} and {END}")
        text = file.read_text(encoding="utf-8")
        fresh = with_table(text, table, file)
        if fresh != text and arguments.check:
            print(f"{file} is stale: run python benchmarks/readme_table.py", file=sys.stderr)
            stale = True
        elif fresh != text:
            file.write_text(fresh, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
