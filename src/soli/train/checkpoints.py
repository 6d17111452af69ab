"""A run's folder and its checkpoints: everything that resuming needs, nothing pickled, written whole or not at all.

runs/NAME/
  recipe.resolved.json   the recipe with every default, as the run began
  metrics.jsonl          one line per report and per evaluation
  checkpoints/step-00000200/  model.safetensors, optimizer.safetensors, config.json, state.json

A checkpoint is written beside its place and renamed when every byte is on disk, so a killed run leaves either a whole
one or a folder that begins with a dot and is swept away by the next. Tensors carry Soli's parameter names, moments
`<parameter>|<moment>`, whichever process holds which piece. `saver` writes, this module names and reads.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from soli.config import load_config
from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.train.optimizer import Optimizer

if TYPE_CHECKING:
    from soli.train.checkpoint_storage import StateReader

RNG, CUDA_RNG = "torch_rng", "cuda_rng"  # of process 0; of process n with .n behind


@dataclass
class RunProgress:
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


def read_progress(checkpoint: Path) -> RunProgress:
    """`state.json` of a checkpoint; SoliError when it cannot be read."""
    file = checkpoint / "state.json"
    try:
        return RunProgress(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SoliError(
            f"{file} cannot be read ({error}); remove this checkpoint to resume from the one before"
        ) from None


def load_checkpoint(checkpoint: Path, model: Transformer, optimizer: Optimizer) -> RunProgress:
    """Put model, optimizer and random state back as they were; SoliError names the tensor that does not fit.

    Any number of processes may have saved. One that had no counterpart then takes the random state of the first.
    """
    from soli.train.checkpoint_storage import StateReader, load  # torch.distributed.checkpoint takes seconds to import

    reader = StateReader(checkpoint, ("model", "optimizer"))
    weights = _weights(reader, model)
    moments = {f"optimizer/{name}": room for name, room in _moments(reader, optimizer).items()}
    draws = {name: torch.empty(reader.tensors[name].size, dtype=torch.uint8) for name in _draws(reader, model)}
    load(reader, weights | moments | draws)
    optimizer.load_state({name.removeprefix("optimizer/"): tensor for name, tensor in moments.items()})
    for name, draw in draws.items():
        if name.startswith(f"optimizer/{RNG}"):
            torch.set_rng_state(draw)
        else:
            torch.cuda.set_rng_state(draw, model.embed_tokens.weight.device)
    return read_progress(checkpoint)


def load_weights(checkpoint: Path, model: Transformer) -> None:
    """Fill a model's parameters and router biases (fp32) from a checkpoint."""
    from soli.train.checkpoint_storage import StateReader, load

    reader = StateReader(checkpoint, ("model",))
    load(reader, _weights(reader, model))


def load_run(run: Path) -> Transformer:
    """The best model of a run, fp32 on the CPU, for export and evaluation."""
    checkpoint = best_checkpoint(run)
    if checkpoint is None:
        raise SoliError(f"{run} holds no checkpoint; give the folder of a run of soli train")
    model = Transformer(load_config(checkpoint), dtype=torch.float32)
    load_weights(checkpoint, model)
    return model


def prune(run: Path, keep: int) -> None:
    """Drop all checkpoints but the `keep` latest, the best and stages' ends; none is half there under its name."""
    found = checkpoints(run)
    kept = {*found[-keep:], *stage_ends(found), best_checkpoint(run)}
    for old in found:
        if old not in kept:
            remove(old)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; killed half-way, it leaves a folder that begins with a dot, as an unfinished save does."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def sweep(run: Path) -> None:
    """Remove what killed runs left unfinished."""
    for unfinished in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(unfinished)


def model_state(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors as `model/name`, parameters and persistent buffers; a tied head is left to the embedding."""
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["model/lm_head.weight"]
    return state


def run_state(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything but the progress, by full name: the model, the optimizer's moments, this process's random state."""
    state = model_state(model) | {f"optimizer/{name}": tensor for name, tensor in optimizer.state().items()}
    state[f"optimizer/{RNG}{_rank_suffix()}"] = torch.get_rng_state()
    device = model.embed_tokens.weight.device
    if device.type == "cuda":
        state[f"optimizer/{CUDA_RNG}{_rank_suffix()}"] = torch.cuda.get_rng_state(device)
    return state


def _weights(reader: StateReader, model: Transformer) -> dict[str, Tensor]:
    state = model_state(model)
    for name in reader.tensors:
        if name.startswith("model/") and name not in state:
            raise SoliError(f"{reader.folder} has {name}, which the recipe's model lacks")
    return state


def _moments(reader: StateReader, optimizer: Optimizer) -> dict[str, Tensor]:
    """Room for every moment of the checkpoint: a piece of it where the parameter is one, else the whole, on the CPU."""
    from torch.distributed.tensor import DTensor

    parameters, room = {name: p for p, name in optimizer.names.items()}, {}
    for full, found in reader.tensors.items():
        part, _, name = full.partition("/")
        if part == "optimizer" and not name.startswith((RNG, CUDA_RNG)):
            p = parameters.get(name.rpartition("|")[0])
            if isinstance(p, DTensor) and p.shape == found.size:
                room[name] = torch.empty_like(p, dtype=found.properties.dtype)
            else:
                room[name] = torch.empty(found.size, dtype=found.properties.dtype)
    return room


def _draws(reader: StateReader, model: Transformer) -> list[str]:
    """Full names of the random states that this process takes up."""
    kinds = (RNG, CUDA_RNG) if model.embed_tokens.weight.device.type == "cuda" else (RNG,)
    candidates = ((f"optimizer/{kind}{_rank_suffix()}", f"optimizer/{kind}") for kind in kinds)
    return [next(name for name in pair if name in reader.tensors) for pair in candidates if pair[1] in reader.tensors]


def _rank_suffix() -> str:
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return f".{rank}" if rank else ""
