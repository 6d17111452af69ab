"""Train the bundled model on a GPU machine that is lent for minutes and has no network: data in, model out, in parts.

    python benchmarks/gpu/train_nano.py pack data/nano-zh-en .carry/nano.tar.xz    # here: 80 MB of tokens in 27 MiB
    python benchmarks/gpu/train_nano.py train .carry/nano.tar.xz --minutes 7 --fit --out $OUT    # there
    python benchmarks/gpu/train_nano.py join FOLDER my-nano                        # here: checked, then unpacked

`train` unpacks beside its run, in --work, and continues from the run's last checkpoint as long as that folder exists.
Each call leaves the models with the lowest held-out loss and of the last step (`best`, `last`) in --out, FP8, as parts
of 15 MiB with their checksum, and the run's metrics. With --fit the first steps are timed and the recipe's schedule is
stretched to end when the minutes do, everything in it at the same share of the run; without, it stays. --set is applied
first. `leave` does the end of `train` alone, for a run that was cut off. --tiny trains a toy model on random tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import chip
import record
import torch

import soli
from soli.checkpoint.writer import write_json
from soli.config import load_config
from soli.data.recipe import find_recipe, load_recipe
from soli.model import Transformer
from soli.plan.throughput import measure_device
from soli.train.checkpoints import load_weights
from soli.train.run_folder import best_checkpoint, checkpoints, read_progress
from soli.train.settings import SECTIONS, TrainSettings, as_recipe, read_settings
from soli.train.setup import Run, prepare
from soli.train.trainer import take_step
from soli.train.trainer import train as run_training

RECIPE = "nano-gpu"
RUN_IN, TIMED = 20, 60  # steps of --fit
SPARE = 0.97  # of the timed speed: evaluations and checkpoints take their time
NEEDED = ("meta.json", "train.bin", "valid.bin", "tokenizer.json", "tokenizer_config.json", "heldout.tsv")
PART = 15 * 2**20  # bytes
TINY = {"model.num_hidden_layers": 2, "schedule.batch_sequences": 2, "run.micro_sequences": 2,
        "schedule.warmup_tokens": 512, "schedule.constant_tokens": 512, "schedule.cosine_tokens": 512,
        "run.precision": "auto", "run.cuda_graph": "false", "run.compile": "false",
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
    manifest = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    held = b"".join((folder / f"model.tar.{number:03d}").read_bytes() for number in range(manifest["parts"]))
    if hashlib.sha256(held).hexdigest() != manifest["sha256"]:
        raise SystemExit(f"the parts in {folder} do not give what was split; fetch them again")
    with tarfile.open(fileobj=io.BytesIO(held)) as source:
        source.extractall(destination, filter="data")
    print(f"{destination}/best and {destination}/last are model folders: soli eval {destination}/best")


def lengthened(settings: TrainSettings, total: int) -> TrainSettings:
    """The same schedule over `total` tokens: all but the warm-up, which is as long as it was, at the same share."""
    schedule, balance, losses = settings.schedule, settings.balance, settings.losses
    warm, before = schedule.warmup_tokens, schedule.total_tokens
    cosine = int((total - warm) * schedule.cosine_tokens / (before - warm))

    def at(tokens: int | None) -> int | None:
        return None if tokens is None else int(total * tokens / before)

    return dataclasses.replace(
        settings,
        schedule=dataclasses.replace(schedule, constant_tokens=total - warm - cosine, cosine_tokens=cosine),
        balance=dataclasses.replace(balance, gamma_tokens=at(balance.gamma_tokens)),
        losses=dataclasses.replace(losses, mtp_late_after_tokens=at(losses.mtp_late_after_tokens)),
    )


def fit(run: Run, end: float) -> None:
    """Time the run's first steps and let its schedule end with the time that there is."""
    for _ in range(RUN_IN):
        take_step(run)
    began, before = time.monotonic(), run.progress.tokens
    for _ in range(TIMED):
        take_step(run)
    now = time.monotonic()
    speed = (run.progress.tokens - before) / (now - began)
    run.progress.seconds += now - began
    run.settings = lengthened(run.settings, run.progress.tokens + max(1, int(SPARE * speed * (end - now))))
    file = run.folder / "recipe.resolved.json"
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | as_recipe(run.settings, {}))
    record.progress(f"{speed:,.0f} tokens/s, so {run.settings.total_tokens / 1e6:.1f} M tokens")


def chosen_settings(folder: Path, changes: list[str]) -> TrainSettings:
    """Those of the recipe with `changes`, or those that the run in `folder` began with."""
    file = folder / "recipe.resolved.json"
    if not checkpoints(folder):
        return read_settings(load_recipe(find_recipe(RECIPE), changes))
    recipe = json.loads(file.read_text(encoding="utf-8"))
    return read_settings({name: recipe[name] for name in (*SECTIONS, "model")})


def train(arguments: argparse.Namespace) -> None:
    """Go on with the run, then leave its best model and its figures."""
    end, work = time.monotonic() + 60 * arguments.minutes, arguments.work
    work.mkdir(parents=True, exist_ok=True)
    unpack(arguments.archive, work / "data")
    changes = [f"{key}={value}" for key, value in (TINY if arguments.tiny else {}).items()]
    settings = chosen_settings(work / "run", changes + (arguments.set or []))
    run = prepare(settings, {}, work / "data", work / "run")
    if arguments.fit and not run.progress.step:
        fit(run, end)
    limited = dataclasses.replace(run.settings.run, max_minutes=max(0, end - time.monotonic()) / 60)
    run.settings = dataclasses.replace(run.settings, run=limited)
    leave(arguments, run_training(run))


def leave(arguments: argparse.Namespace, ended: str = "cut off") -> None:
    """The models of the run in --work and its figures, in --out."""
    run, out, models = arguments.work / "run", arguments.out, arguments.work / "models"
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(models, ignore_errors=True)
    best, last = best_checkpoint(run), checkpoints(run)[-1]
    assert best is not None
    for name, checkpoint in {"best": best, "last": last}.items():
        model = Transformer(load_config(checkpoint), dtype=torch.float32)
        load_weights(checkpoint, model)
        soli.save_model(model, models / name, format="fp8", tokenizer_from=run)
    split(models, out)
    for name in ("metrics.jsonl", "recipe.resolved.json"):
        shutil.copy(run / name, out)
    progress, settings = read_progress(last), chosen_settings(run, [])
    figures = {
        "ended": ended,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": record.rounded(progress.seconds),
        "tokens_s": record.rounded(progress.tokens / max(progress.seconds, 1e-9)),
        "best": {"step": read_progress(best).step, "heldout_loss": read_progress(best).valid_loss},
        "products_tflops": record.rounded(measure_device(settings).tflops),
    }
    chip.finish("train_nano", arguments, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("pack")
    verb.add_argument("data", type=Path), verb.add_argument("archive", type=Path)
    verb = verbs.add_parser("join")
    verb.add_argument("folder", type=Path), verb.add_argument("destination", type=Path)
    for name in ("train", "leave"):
        verb = verbs.add_parser(name)
        verb.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "soli-nano")
        verb.add_argument("--out", type=Path, required=True)
        verb.add_argument("--tiny", action="store_true", help="a smoke test: a toy, any device, no result")
        if name == "train":
            verb.add_argument("archive", type=Path)
            verb.add_argument("--minutes", type=float, default=7.0)
            verb.add_argument("--fit", action="store_true", help="stretch a new run's schedule to end with the minutes")
            verb.add_argument("--set", action="append", metavar="SECTION.FIELD=VALUE")
    arguments = parser.parse_args()
    if arguments.verb == "pack":
        pack(arguments.data, arguments.archive)
    elif arguments.verb == "join":
        join(arguments.folder, arguments.destination)
    elif arguments.verb == "leave":
        leave(arguments)
    else:
        chip.require_gpu(arguments.tiny)
        train(arguments)


if __name__ == "__main__":
    main()
