"""The model in the box, trained on a GPU that is lent for minutes and reaches nothing: data in, model out, in pieces.

    python benchmarks/gpu/train_nano.py pack data/nano-zh-en .carry/nano.tar.xz    # here: 80 MB of tokens in 27 MiB
    python benchmarks/gpu/train_nano.py train .carry/nano.tar.xz --minutes 8 --out $OUT    # there, again and again
    python benchmarks/gpu/train_nano.py join FOLDER my-nano                        # here: checked, then unpacked

`train` unpacks beside its run, in --work, and goes on from the run's last checkpoint as long as that folder lives; each
call leaves the best model so far in --out, FP8, as parts of 15 MiB with their checksum, and the run's figures. The
recipe's schedule is kept; what is said by --set comes after. --tiny trains a toy on invented tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

import chip
import record

import soli
from soli.data.recipe import find_recipe, load_recipe
from soli.train.loop import train as run_training
from soli.train.settings import read_settings
from soli.train.setup import prepare
from soli.train.state import load_run

NEEDED = ("meta.json", "train.bin", "valid.bin", "tokenizer.json", "tokenizer_config.json", "heldout.tsv")
PART = 15 * 2**20  # bytes
TINY = {"model.num_hidden_layers": 2, "schedule.batch_sequences": 2, "run.micro_sequences": 2,
        "schedule.batch_sequences_start": "none", "schedule.batch_ramp_tokens": 0,
        "schedule.warmup_tokens": 512, "schedule.constant_tokens": 512, "schedule.cosine_tokens": 512,
        "eval.tokens": 512, "eval.samples": 0, "schedule.sequence_length": 64}  # fmt: skip


def pack(data: Path, archive: Path) -> None:
    """What training reads of a data folder, in one file."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=6) as into:
        for name in NEEDED:
            if (data / name).is_file():
                into.add(data / name, name)
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")


def unpack(archive: Path, folder: Path) -> None:
    """Once; a folder that is there is whole."""
    if folder.is_dir():
        return
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    with tarfile.open(archive) as source:
        source.extractall(draft, filter="data")
    draft.rename(folder)


def split(folder: Path, out: Path) -> None:
    """A folder as model.tar.000, .001 ... and model.json with its checksum."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as into:
        into.add(folder, ".")
    held = memory.getvalue()
    parts = [held[start : start + PART] for start in range(0, len(held), PART)]
    for number, part in enumerate(parts):
        (out / f"model.tar.{number:03d}").write_bytes(part)
    record_ = {"parts": len(parts), "sha256": hashlib.sha256(held).hexdigest()}
    (out / "model.json").write_text(json.dumps(record_), encoding="utf-8")


def join(folder: Path, destination: Path) -> None:
    """What `split` made, a folder again; nothing is unpacked unless the checksum fits."""
    said = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    held = b"".join((folder / f"model.tar.{number:03d}").read_bytes() for number in range(said["parts"]))
    if hashlib.sha256(held).hexdigest() != said["sha256"]:
        raise SystemExit(f"the parts in {folder} do not give what was split; fetch them again")
    with tarfile.open(fileobj=io.BytesIO(held)) as source:
        source.extractall(destination, filter="data")
    print(f"{destination} is a model folder: soli generate {destination}")


def train(arguments: argparse.Namespace) -> None:
    """Go on with the run, then leave its best model and its figures."""
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    unpack(arguments.archive, work / "data")
    changes = [f"run.max_minutes={arguments.minutes}", 'run.precision="bf16"', "run.micro_sequences=32"]
    changes += [f"{key}={value}" for key, value in (TINY if arguments.tiny else {}).items()]
    settings = read_settings(load_recipe(find_recipe("nano-zh-en"), changes + (arguments.set or [])))
    run = prepare(settings, {}, work / "data", work / "run")
    why = run_training(run)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = work / "model"
    shutil.rmtree(model, ignore_errors=True)
    soli.save_model(load_run(work / "run"), model, format="fp8", tokenizer_from=work / "run")
    split(model, arguments.out)
    shutil.copy(work / "run" / "metrics.jsonl", arguments.out)
    done = run.progress
    speed = record.rounded(done.tokens / max(done.seconds, 1e-9))
    figures = {"ended": why, "steps": done.step, "tokens": done.tokens, "seconds": done.seconds, "tokens_s": speed}
    chip.finish("train_nano", arguments, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("pack")
    verb.add_argument("data", type=Path), verb.add_argument("archive", type=Path)
    verb = verbs.add_parser("join")
    verb.add_argument("folder", type=Path), verb.add_argument("destination", type=Path)
    verb = verbs.add_parser("train")
    verb.add_argument("archive", type=Path)
    verb.add_argument("--minutes", type=float, default=8.0)
    verb.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "soli-nano")
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--set", action="append", metavar="SECTION.FIELD=VALUE")
    verb.add_argument("--tiny", action="store_true", help="a smoke test: a toy, any device, no result")
    arguments = parser.parse_args()
    if arguments.verb == "pack":
        pack(arguments.data, arguments.archive)
    elif arguments.verb == "join":
        join(arguments.folder, arguments.destination)
    else:
        chip.require_gpu(arguments.tiny)
        train(arguments)


if __name__ == "__main__":
    main()
