"""Time and memory to open a whole DeepSeek-V3, and the start-up time of the verbs that need no weights.

The folder has every tensor of the official FP8 files, MTP module included, at its true shape: 689 GB in sparse files,
which take no space on the disk. Soli reads the headers and checks presence, shape, dtype and scales of every tensor
against config.json; the peer, safetensors' safe_open, reads the headers and checks their layout alone. The peer of
`soli count` is the same count from transformers' model on the meta device. Each opening and start is a new process.

    python benchmarks/open_checkpoint.py
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import record

from soli.config import preset

SHARD_BYTES = 4 << 30
HELP_OF_TRANSFORMERS = """
import sys
from transformers.cli.transformers import main
sys.argv = ["transformers", "--help"]
main()
"""
COUNT_BY_TRANSFORMERS = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained({folder!r}))
print(sum(p.numel() for p in model.parameters()))
"""


def write_sparse(folder: Path) -> int:
    """DeepSeek-V3 in FP8 with holes for values, in shards of 4 GiB; returns the bytes it seems to hold."""
    from soli.checkpoint.name_map import slots
    from soli.checkpoint.reader import INDEX
    from soli.checkpoint.shard import encode_header
    from soli.checkpoint.writer import Target

    config, target = preset("deepseek-v3"), Target("fp8")
    specs = [spec for slot in slots(config) for spec in target.specs(slot)]
    weight_map, total = {}, 0
    for number, part in enumerate(shards(specs)):
        head, _, size = encode_header(part)
        file = folder / f"model-{number:05}.safetensors"
        with file.open("wb") as stream:
            stream.write(head)
            stream.truncate(size)
        weight_map |= {name: file.name for name, _, _ in part}
        total += size
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(target.config(config)))
    return total


def shards(specs: list[tuple[str, str, tuple[int, ...]]]) -> Iterator[list[tuple[str, str, tuple[int, ...]]]]:
    """The tensors in runs whose files reach SHARD_BYTES."""
    from soli.checkpoint.shard import encode_header

    part: list[tuple[str, str, tuple[int, ...]]] = []
    size = 0
    for spec in specs:
        part.append(spec)
        size += encode_header([spec])[2]
        if size >= SHARD_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def open_once(reader: str, folder: Path) -> dict[str, float]:
    """Seconds and resident MiB that one opening adds to this process, imports left out, and its tensors."""
    import torch  # noqa: F401  both readers need it, so it is in memory before either opens

    if reader == "soli":
        from soli.checkpoint import open_checkpoint as opens
    else:
        opens = open_with_safetensors
    before, start = resident_mib(), time.process_time()
    checkpoint = opens(folder)
    seconds, mib = time.process_time() - start, resident_mib() - before
    tensors = len(checkpoint.entries) if reader == "soli" else sum(len(file.keys()) for file in checkpoint)
    return {"seconds": seconds, "mib": mib, "tensors": tensors}


def open_with_safetensors(folder: Path) -> list[Any]:
    from safetensors import safe_open

    return [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def child(*arguments: str) -> str:
    """What a new Python of this tree printed."""
    environment = os.environ | {"PYTHONPATH": str(record.ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True)
    return process.stdout


def child_seconds(*arguments: str) -> Callable[[], float]:
    """The processor time of a new Python, from its start to its end."""

    def child_time() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def run() -> float:
        before = child_time()
        child(*arguments)
        return child_time() - before

    return run


def measure_opening(folder: Path, total: int, rounds: int) -> list[dict[str, Any]]:
    memory: dict[str, list[float]] = {"soli": [], "safetensors": []}
    tensors: dict[str, int] = {}

    def contender(reader: str) -> Callable[[], float]:
        def run() -> float:
            opening = json.loads(child(__file__, "--open", reader, str(folder)))
            memory[reader].append(opening["mib"])
            tensors[reader] = opening["tensors"]
            return opening["seconds"]

        return run

    seconds = record.interleaved({reader: contender(reader) for reader in memory}, rounds)
    if tensors["soli"] != tensors["safetensors"]:
        sys.exit(f"the readers disagree on the number of tensors, {tensors}: nothing was recorded")
    what = f"DeepSeek-V3 in FP8, {total / 1e9:.0f} GB, {tensors['soli']:,} tensors"
    checked, theirs = "opened and checked", "safetensors, unchecked"
    return [
        record.row(f"{what}: {checked}", "s", seconds["soli"], {theirs: seconds["safetensors"]}),
        record.row(f"{what}: resident memory", "MiB", memory["soli"], {theirs: memory["safetensors"]}),
    ]


def measure_start_up(folder: Path, rounds: int) -> list[dict[str, Any]]:
    starts = {
        "count": child_seconds("-m", "soli", "count", "deepseek-v3"),
        "count by transformers": child_seconds("-c", COUNT_BY_TRANSFORMERS.format(folder=str(folder))),
        "help": child_seconds("-m", "soli", "--help"),
        "help of transformers": child_seconds("-c", HELP_OF_TRANSFORMERS),
        "import torch": child_seconds("-c", "import torch"),
    }
    seconds = record.interleaved(starts, rounds)
    count_peers = {"transformers on the meta device": seconds["count by transformers"]}
    helped = {"transformers --help": seconds["help of transformers"], "import torch": seconds["import torch"]}
    return [
        record.row("soli count deepseek-v3, from start to end", "s", seconds["count"], count_peers),
        record.row("soli --help, from start to end", "s", seconds["help"], helped),
    ]


def imports_torch(*arguments: str) -> bool:
    code = f"import sys\nfrom soli.cli import main\nmain({list(arguments)!r})\nprint('torch' in sys.modules)"
    return child("-c", code).splitlines()[-1] == "True"


def main() -> None:
    parser = record.parser(__doc__, rounds=7)
    parser.add_argument("--open", nargs=2, metavar=("READER", "FOLDER"), help="open once, in this process; print JSON")
    arguments = parser.parse_args()
    if arguments.open:
        return print(json.dumps(open_once(arguments.open[0], Path(arguments.open[1]))))
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder)
        total = write_sparse(folder)
        rows = measure_opening(folder, total, arguments.rounds) + measure_start_up(folder, arguments.rounds)
    torch_free = {"count": not imports_torch("count", "deepseek-v3"), "help": not imports_torch("--help")}
    record.finish(
        "open_checkpoint", {"bytes": total, "rounds": arguments.rounds, "starts_without_torch": torch_free}, rows
    )


if __name__ == "__main__":
    main()
