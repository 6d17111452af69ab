"""A run's folder and its checkpoints: everything that resuming needs, nothing pickled, written whole or not at all.

runs/NAME/
  recipe.resolved.json   the recipe with every default, as the run began
  metrics.jsonl          one line per report and per evaluation
  checkpoints/step-00000200/  model.safetensors, optimizer.safetensors, config.json, state.json

A checkpoint is written beside its place and renamed when every byte is on disk, so a killed run leaves either a whole
one or a folder that begins with a dot and is swept away by the next. Tensors carry Soli's parameter names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from soli.checkpoint.writer import write_json
from soli.config import load_config
from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.train.optimizer import Optimizer

RNG = "torch_rng"


@dataclass
class Progress:
    """Where a run stands; `position` counts windows of the stage's order of the data, steps and tokens the run's."""

    step: int = 0
    tokens: int = 0
    position: int = 0
    seconds: float = 0.0  # spent training, over all sittings
    valid_loss: float | None = None  # measured at this very step, else None
    losses: list[float] = field(default_factory=list)  # of the last steps that moved weights, for the guard
    norms: list[float] = field(default_factory=list)  # of their gradients
    skipped: int = 0  # steps that moved nothing
    skipped_in_row: int = 0
    stage: int = 0  # 0 pretraining, n the n-th [[extension]] phase
    stage_start: int = 0  # tokens at which the stage began


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss of the latest stage, else the latest; None when there is none.

    Losses of two stages are not compared: their windows are of other lengths.
    """
    found = [(read_progress(path), path) for path in checkpoints(run)]
    stage = max((progress.stage for progress, _ in found), default=0)
    scored = [(p.valid_loss, path) for p, path in found if p.stage == stage and p.valid_loss is not None]
    return min(scored)[1] if scored else (found[-1][1] if found else None)


def stage_ends(found: list[Path]) -> list[Path]:
    """The last checkpoint of each stage but the latest, of checkpoints in the order of their steps."""
    stages = [read_progress(path).stage for path in found]
    return [path for path, stage, later in zip(found, stages, stages[1:], strict=False) if stage < later]


def read_progress(checkpoint: Path) -> Progress:
    """`state.json` of a checkpoint; SoliError when it cannot be read."""
    file = checkpoint / "state.json"
    try:
        return Progress(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SoliError(
            f"{file} cannot be read ({error}); remove this checkpoint to resume from the one before"
        ) from None


def save_checkpoint(run: Path, model: Transformer, optimizer: Optimizer, progress: Progress, keep: int) -> Path:
    """Write the state after `progress.step` steps, then drop all but the `keep` latest, the best and stages' ends."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".step-*"):
        shutil.rmtree(unfinished)
    final = folder / f"step-{progress.step:08d}"
    draft = folder / f".{final.name}"
    draft.mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    moments = {name: tensor.contiguous() for name, tensor in optimizer.state().items()}
    save_file(state, draft / "model.safetensors")
    save_file({**moments, RNG: torch.get_rng_state()}, draft / "optimizer.safetensors")
    write_json(draft / "config.json", model.config.to_dict())
    write_json(draft / "state.json", dataclasses.asdict(progress))
    for file in draft.iterdir():
        _flush(file)
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)
    _flush(folder)
    _prune(run, keep)
    return final


def load_checkpoint(checkpoint: Path, model: Transformer, optimizer: Optimizer) -> Progress:
    """Put model, optimizer and random state back as they were; SoliError names the file that does not fit."""
    load_weights(checkpoint, model)
    moments = _read(checkpoint / "optimizer.safetensors")
    torch.set_rng_state(moments.pop(RNG))
    optimizer.load_state(moments)
    return read_progress(checkpoint)


def load_weights(checkpoint: Path, model: Transformer) -> None:
    """Fill a model's parameters and router biases (fp32) from a checkpoint."""
    file = checkpoint / "model.safetensors"
    tensors = _read(file)
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise SoliError(f"{file} does not fit the recipe's model: {str(error).splitlines()[-1].strip()}") from None


def load_run(run: Path) -> Transformer:
    """The best model of a run, fp32 on the CPU, for export and evaluation."""
    checkpoint = best_checkpoint(run)
    if checkpoint is None:
        raise SoliError(f"{run} holds no checkpoint; give the folder of a run of soli train")
    model = Transformer(load_config(checkpoint), dtype=torch.float32)
    load_weights(checkpoint, model)
    return model


def _prune(run: Path, keep: int) -> None:
    found = checkpoints(run)
    kept = {*found[-keep:], *stage_ends(found), best_checkpoint(run)}
    for old in found:
        if old not in kept:
            shutil.rmtree(old)


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise SoliError(
            f"{file} cannot be read ({error}); remove this checkpoint to resume from the one before"
        ) from None


def _flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
