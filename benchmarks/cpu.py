"""The speed table of a CPU, in one run: Soli beside memory bandwidth, llama.cpp, transformers and vLLM.

    python benchmarks/cpu.py --lab LAB --llama DIR --vllm PYTHON
    python benchmarks/cpu.py --lab LAB --rows small-decode,small-prefill --rounds 7

LAB holds what models.py makes; DIR has llama-bench and llama-batched-bench; PYTHON is one that has vllm. Whatever is
missing is left out with a message. Rows: SHAPE-decode, -prefill (512 tokens, of nano 496), -batch (16 requests of 128
in and 128 out, Soli's through its engine) and, of large, -resident; `sparse`, decoding as experts grow from 16 to 256
while six are activated, and a mixture beside a dense model of equal activated parameters; `training`, tiny's steps.

Contenders take turns in every round. A measurement in which other processes took more than 5 % of the machine is
repeated (quiet.py). The peer "memory" is the speed at which each activated weight is read once at the measured memory
bandwidth, and nothing else is done. Every line states what it must reach, and whether it does. Rows that an earlier run
of the same commit measured stay in results/cpu.json; the picture is docs/images/cpu.png.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import contenders
import cpu_plot
import models
import quiet
import record
import sparse_law
from contenders import QUICK, Absent, Ask, Lab, Work

from soli import machine

MEMORY, BEST, FILE, RESIDENT = "memory", "the best peer", "the file", "resident"
LEVEL = record.EVEN[0]
GGUF = {"bf16": "llama.cpp bf16", "int8": "llama.cpp q8_0", "int4": "llama.cpp q4_0"}
BF16 = (GGUF["bf16"], "transformers bf16", "vLLM bf16")
ALIKE = 1 / 1.1  # within a tenth, as a ratio of speeds
EXPERTS = (16, 64, 256)
SAID = {
    "tiny": "tiny (12 M)", "small": "small (1.2 B)", "large": "large (16 B)", "nano": "nano",
    "decode": "decode", "prefill": "prefill", "batch": "batch 16", RESIDENT: "resident memory",
}  # fmt: skip
NOTE = (
    "Wall time, two threads. Contenders take turns; a measurement in which other processes took more than 5 % of the "
    "machine is repeated. Memory bandwidth: reading each activated weight once, at the bandwidth of the same rounds."
)


@dataclass(frozen=True)
class Line:
    """One line of the table: Soli's `kind` of weights beside `peers`, and the ratio it must reach `against` each."""

    shape: str
    question: str
    kind: str
    peers: tuple[str, ...]
    against: Mapping[str, float] = field(default_factory=dict)

    @property
    def row(self) -> str:
        return f"{self.shape}-{self.question}"

    @property
    def soli(self) -> str:
        return f"soli {self.kind}"


LINES = (
    Line("small", "decode", "bf16", BF16, {GGUF["bf16"]: 1.0, MEMORY: 0.85}),
    Line("small", "decode", "fp8", (), {MEMORY: 0.85}),
    Line("small", "decode", "int8", (GGUF["int8"],), {GGUF["int8"]: 1.25, MEMORY: 0.85}),
    Line("small", "decode", "int4", (GGUF["int4"],), {GGUF["int4"]: 1.5, MEMORY: 0.85}),
    Line("small", "prefill", "bf16", BF16, {BEST: 1.5}),
    Line("small", "prefill", "int8", (GGUF["int8"], *BF16), {BEST: 2.0}),
    Line("small", "prefill", "int4", (GGUF["int4"], *BF16)),
    Line("small", "batch", "bf16", BF16, {BEST: 1.5}),
    Line("small", "batch", "int8", (GGUF["int8"],), {BEST: 1.5}),
    Line("small", "batch", "int4", (GGUF["int4"],), {BEST: 1.5}),
    *(
        Line(shape, question, kind, (GGUF[kind],), {GGUF[kind]: LEVEL})
        for shape, kinds in (("tiny", ("bf16", "int8", "int4")), ("nano", ("bf16", "int8")))
        for question in ("decode", "prefill")
        for kind in kinds
    ),
    Line("large", "decode", "int4", (GGUF["int4"],), {GGUF["int4"]: 1.1}),
    Line("large", "prefill", "int4", (GGUF["int4"],), {GGUF["int4"]: 2.0}),
    Line("large", RESIDENT, "int4", (GGUF["int4"],), {FILE: ALIKE}),
)
ROWS = (*dict.fromkeys(line.row for line in LINES), "sparse", "training")
Rows = list[dict[str, Any]]
Measurements = Mapping[str, Sequence[quiet.Measurement]]  # by contender, one per round


def open_contender(lab: Lab, shape: str, name: str, work: Work) -> AbstractContextManager[Ask]:
    """A contender by its name in LINES, such as "soli int8", on one shape."""
    if name == MEMORY:
        return contenders.memory(lab)
    who, kind = name.rsplit(" ", 1)
    kind = f"gguf-{kind}" if who == "llama.cpp" else kind
    path = models.model_path(lab.folder, shape, kind)
    opens = {
        "soli": contenders.soli,
        "llama.cpp": contenders.llama_cpp,
        "transformers": contenders.transformers,
        "vLLM": contenders.vllm,
    }
    return opens[who](lab, path, work)


def measure_shape(lab: Lab, shape: str, rows: Sequence[str], work: Work, rounds: int, limit: float) -> Iterator[Rows]:
    """The requested rows of one shape, each as it is measured; all its contenders stay open meanwhile."""
    lines = [line for line in LINES if line.shape == shape and line.row in rows]
    if shape == "nano":  # it has 512 positions
        work = replace(work, prefill=min(work.prefill, 496))
    with ExitStack() as stack:
        asks: dict[str, Ask] = {}
        for name in dict.fromkeys(name for line in lines for name in (line.soli, *line.peers, *line.against)):
            if name in (BEST, FILE):
                continue
            try:
                asks[name] = stack.enter_context(open_contender(lab, shape, name, work))
            except Absent as reason:
                record.progress(f"{shape}: without {name}: {reason}")
        for row in dict.fromkeys(line.row for line in lines):
            record.progress(row)
            yield measure_row(lab, [line for line in lines if line.row == row], asks, rounds, limit)


def measure_row(lab: Lab, lines: Sequence[Line], asks: Mapping[str, Ask], rounds: int, limit: float) -> Rows:
    """The lines of one row, measured together; batch 16, which takes long, gets half as many rounds."""
    question, first = lines[0].question, lines[0].shape
    names = dict.fromkeys(name for line in lines for name in (line.soli, *line.peers, *line.against))
    sides: dict[str, Callable[[], float]] = {}
    for name in names:
        if name not in asks:
            continue
        try:
            asks[name]("prefill" if question == RESIDENT else question, True)
        except Absent as reason:
            record.progress(f"without {name}: {reason}")
            continue
        sides[name] = partial(_turn, asks[name], question, first == "large")
    fewer = {RESIDENT: 1, "batch": max(1, rounds // 2)}
    measurements = quiet.interleaved(sides, fewer.get(question, rounds), limit)
    return [row for line in lines if line.soli in measurements for row in line_rows(lab, line, measurements)]


def _turn(ask: Ask, question: str, again: bool) -> float:
    """One measurement; `again` warms up before it, where contenders push each other's files out of memory."""
    if again:
        ask(question, True)
    return ask(question, False)


def line_rows(lab: Lab, line: Line, measurements: Measurements) -> Iterator[dict[str, Any]]:
    """A line beside its peers, and where it is compared with the memory or a file, another for that."""
    what, soli = f"{SAID[line.question]}, {SAID[line.shape]}, {line.kind}", quiet.values(measurements[line.soli])
    unit = "MiB" if line.question == RESIDENT else "tokens/s"
    peers = {name: quiet.values(measurements[name]) for name in line.peers if name in measurements}
    folder = models.model_path(lab.folder, line.shape, line.kind)
    if FILE in line.against:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
        yield judge(what, unit, soli, {FILE: [size]} | peers, line, measurements)
        return
    if peers or set(line.against) != {MEMORY}:
        yield judge(what, unit, soli, peers, line, measurements)
    if MEMORY in line.against and MEMORY in measurements:
        size = bytes_per_token(folder)
        bandwidth_limit = {MEMORY: [1e9 * speed / size for speed in quiet.values(measurements[MEMORY])]}
        yield judge(f"{what}, beside memory bandwidth", unit, soli, bandwidth_limit, line, measurements)


def judge(
    what: str,
    unit: str,
    soli: Sequence[float],
    peers: Mapping[str, Sequence[float]],
    line: Line,
    measurements: Measurements,
) -> dict[str, Any]:
    """A row of results, with its aims that concern these peers and whether each is reached."""
    row = record.row(what, unit, soli, peers)
    aims = []
    for name, least in line.against.items():
        if name == BEST and row["peer"]:
            reached = row["ratio"]
        elif name in peers:
            reached = row["peers"][name]["ratio"]
        else:
            continue
        aims.append({"against": name, "at_least": round(least, 3), "reached": reached, "met": reached >= least})
    shares = [quiet.most(measurements[name]) for name in (line.soli, *peers) if name in measurements]
    others = max((share for share in shares if share is not None), default=None)
    others = None if others is None else round(others, 3)
    return row | {"row": line.row, "aims": aims, "rounds": len(soli), "others": others}


def bytes_per_token(folder: Path) -> float:
    """Bytes of the weights that one token activates, as stored in the folder: of routed experts the selected ones, the
    embedding not at all."""
    from soli.checkpoint.load import open_checkpoint

    checkpoint = open_checkpoint(folder, mtp=False)
    share = checkpoint.config.num_experts_per_tok / max(1, checkpoint.config.n_routed_experts)
    total = 0.0
    for slot in checkpoint.slots:
        if slot.copy or slot.soli == "embed_tokens.weight":
            continue
        names = {slot.name, *map(slot.scale_name, ("fp8", "int8", "int4"))}
        size = sum(entry.end - entry.start for name in names if (entry := checkpoint.entries.get(name)))
        total += size * (share if slot.expert is not None else 1)
    return total


def measure_sparse(lab: Lab, work: Work, rounds: int, limit: float) -> Rows:
    """Decoding with more and more experts of which equally many are activated, and a mixture beside a dense model."""
    experts, shape = (EXPERTS, models.SHAPES["small"]) if work != QUICK else ((8, 16), models.SHAPES["tiny"])
    with ExitStack() as stack:
        asks = {
            str(count or "dense"): stack.enter_context(
                record.alone(sparse_law.build, count, shape, asdict(work), threads=lab.threads)
            )
            for count in (0, *experts)
        }
        for ask in asks.values():
            ask("decode", True)
        sides = {name: lambda ask=ask: ask("decode", False) for name, ask in asks.items()}
        measurements = quiet.interleaved(sides, rounds, limit)
    few, middle, many = str(experts[0]), str(experts[len(experts) // 2]), str(experts[-1])
    rows = []
    for soli, peer, what in (
        (many, few, f"decode, {shape['num_experts_per_tok']} of {many} experts beside as many of {few}"),
        (middle, "dense", f"decode, mixture of {middle} experts beside a dense model of as many activated parameters"),
    ):
        line = Line("sparse", "decode", soli, (peer,), {peer: ALIKE})
        values = {name: quiet.values(one) for name, one in measurements.items()}
        row = judge(what, "tokens/s", values[soli], {peer: values[peer]}, line, measurements)
        rows.append(row | {"row": "sparse"})
    return rows


def measure_training(lab: Lab, rounds: int, limit: float) -> Rows:
    """Whole training steps of tiny, as train_step.py takes them, by wall time."""
    import train_step

    folder = models.model_path(lab.folder, "tiny", "bf16")
    if not folder.exists():
        record.progress(f"without training: {folder} is not there")
        return []
    names = ["soli", *(f"transformers {name}" for name in contenders.IMPLEMENTATIONS)]
    if machine.package_version("transformers") is None or "transformers" in lab.without:
        names = names[:1]
    with ExitStack() as stack:
        asks = {
            name: stack.enter_context(
                record.alone(train_step.build, folder, name, time.perf_counter, threads=lab.threads)
            )
            for name in names
        }
        first = {name: ask()[1] for name, ask in asks.items()}
        if max(first.values()) - min(first.values()) > 0.02:
            sys.exit(f"the first losses differ, {first}: nothing was recorded")
        sides = {name: lambda ask=ask: ask()[0] for name, ask in asks.items()}
        measurements = quiet.interleaved(sides, rounds, limit)
    what = f"training step, tiny, bf16 over fp32 masters, {train_step.SEQUENCES} x {train_step.LENGTH} tokens"
    line = Line("training", "step", "", tuple(names[1:]), {BEST: 1.5})
    peers = {name: quiet.values(measurements[name]) for name in names[1:]}
    measurements = measurements | {line.soli: measurements["soli"]}
    row = judge(what, "tokens/s", quiet.values(measurements["soli"]), peers, line, measurements)
    return [row | {"row": "training"}]


def measure(lab: Lab, rows: Sequence[str], work: Work, rounds: int, limit: float) -> Iterator[Rows]:
    """Every requested row, as it is measured."""
    for shape in models.ALL:
        if any(line.shape == shape and line.row in rows for line in LINES):
            yield from measure_shape(lab, shape, rows, work, rounds, limit)
    if "sparse" in rows:
        yield measure_sparse(lab, work, rounds, limit)
    if "training" in rows:
        yield measure_training(lab, rounds, limit)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = record.parser(__doc__, rounds=5)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    add_lab_options(parser)
    parser.add_argument(
        "--record",
        default="cpu",
        metavar="NAME",
        help="results/NAME.json and its picture (default cpu; cpu_amx: with AMX; cpu_avx2: AVX2 alone)",
    )
    parser.add_argument("--note", default="", help="what else must be said of this machine or its peers")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.rows.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    return arguments


def add_lab_options(parser: argparse.ArgumentParser) -> None:
    """Where models and peers are, and how to measure: what cpu.py and serve.py share."""
    parser.add_argument("--lab", type=Path, default=Path(os.environ.get("LAB", "lab")), help="as models.py made it")
    parser.add_argument("--llama", type=Path, help="folder with llama-bench and llama-batched-bench")
    parser.add_argument("--vllm", type=Path, help="a python that has vllm")
    parser.add_argument("--vllm-preload", default="", help="libraries for vLLM's LD_PRELOAD, joined by colons")
    parser.add_argument("--without", default="", help="leave out some of soli, llama.cpp, transformers, vLLM")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default 2)")
    parser.add_argument("--others", type=float, default=quiet.LIMIT, help="share of the machine others may take (0.05)")
    parser.add_argument(
        "--quick", action="store_true", help="a few tokens, to see that all of it runs; records nothing"
    )


def lab_of(arguments: argparse.Namespace) -> Lab:
    return Lab(
        arguments.lab, arguments.llama, arguments.vllm, arguments.vllm_preload, arguments.threads,
        tuple(arguments.without.split(",")),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    lab, work = lab_of(arguments), QUICK if arguments.quick else Work()
    size = {"rounds": arguments.rounds, "others_at_most": arguments.others, **asdict(work)}
    for rows in measure(lab, arguments.rows.split(","), work, arguments.rounds, arguments.others):
        for row in rows:
            print(describe(row), flush=True)
        if not arguments.quick:
            result = record.merge(
                arguments.record, f"{NOTE} {arguments.note}".strip(), size, rows, threads=arguments.threads
            )
            cpu_plot.draw(result["rows"], record.ROOT / "docs" / "images" / f"{arguments.record}.png")


def describe(row: Mapping[str, Any]) -> str:
    """A row with its aims as lines of text."""
    lines = [record.summary(row)]
    for aim in row["aims"]:
        verdict = "reached" if aim["met"] else "missed"
        lines.append(f"    {verdict}: {aim['reached']:.2f} of {aim['at_least']:.2f} against {aim['against']}")
    if row["others"] is not None and row["others"] > quiet.LIMIT:
        lines.append(f"    disturbed: others took up to {row['others']:.0%} of the machine")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
