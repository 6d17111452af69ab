"""A run's folder: which checkpoints it has, what each has reached, which are removed.

runs/NAME/
  run.lock               who trains here (soli/train/run_lock.py)
  recipe.resolved.json   the recipe with every default, as the run began
  metrics.jsonl          one line per report and per evaluation
  checkpoints/step-00000200/  model.safetensors, optimizer.safetensors, config.json, state.json

A checkpoint is complete or not there: what is being written, or removed, has a name that begins with a dot.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soli.atomic_file import remove
from soli.errors import SoliError
from soli.input_files import kind_of, parse_json, read_text
from soli.sections import NonNegativeInt, annotations_of, convert, reject_unknown

REMOVE = "remove this checkpoint to resume from the one before"
CHECKPOINT_ID = "checkpoint_id"  # keys of state.json beside the progress; version 0.2 and before wrote none
CONFIG_DIGEST = "config_sha256"
NAME = re.compile(r"step-([0-9]{8,})")


@dataclass
class RunProgress:
    """What a run has reached. `position` counts windows of the stage, steps and tokens those of the run."""

    step: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    position: NonNegativeInt = 0
    seconds: float = 0.0  # spent training, over all sessions
    valid_loss: float | None = None  # measured at this very step, else None
    losses: list[float] = field(default_factory=list)  # of the last steps that changed weights, for anomaly detection
    norms: list[float] = field(default_factory=list)  # of their gradients
    skipped: NonNegativeInt = 0  # steps that moved nothing
    skipped_in_row: NonNegativeInt = 0
    stage: NonNegativeInt = 0  # 0 pretraining, n the n-th [[extension]] phase
    stage_start: NonNegativeInt = 0  # tokens at which the stage began


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss of the latest stage, else the latest; None when there is none.

    Losses of two stages are not compared: their windows are of other lengths.
    """
    saved = _of_latest_stage(run)
    evaluated = [(progress.valid_loss, path) for progress, path in saved if progress.valid_loss is not None]
    if evaluated:
        return min(evaluated)[1]
    return saved[-1][1] if saved else None


def _of_latest_stage(run: Path) -> list[tuple[RunProgress, Path]]:
    """Complete checkpoints of a run's latest stage, oldest first, with what each has reached."""
    saved = []
    for path in checkpoints(run):
        try:
            saved.append((read_progress(path), path))
        except SoliError:
            if path.is_dir():
                raise  # else the running process removed it after the list was made
    stage = max((progress.stage for progress, _ in saved), default=0)
    return [(progress, path) for progress, path in saved if progress.stage == stage]


def require_best_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run; SoliError where it has none."""
    checkpoint = best_checkpoint(run)
    if checkpoint is None:
        raise SoliError(f"{run} holds no checkpoint; give the folder of a run of soli train")
    return checkpoint


def latest_checkpoints(run: Path, count: int) -> list[Path]:
    """So many of a run's latest checkpoints, oldest first; SoliError where its latest stage has fewer."""
    if count < 1:
        raise SoliError(f"{count} checkpoints have no mean; give 1 or more")
    require_best_checkpoint(run)
    saved = _of_latest_stage(run)
    if len(saved) < count:
        of_phase = " of its latest phase" if saved and saved[-1][0].stage else ""
        raise SoliError(f"{run} has {len(saved)} checkpoints{of_phase}, not {count}; run.keep says how many are kept")
    return [path for _, path in saved[-count:]]


def stage_ends(saved: list[Path]) -> list[Path]:
    """The last checkpoint of each stage but the latest, of checkpoints in the order of their steps."""
    stages = [read_progress(path).stage for path in saved]
    return [path for path, stage, later in zip(saved, stages, stages[1:], strict=False) if stage < later]


def read_progress(checkpoint: Path) -> RunProgress:
    """`state.json` of a checkpoint; SoliError when it cannot be read or is of another step."""
    file = checkpoint / "state.json"
    state = read_state(checkpoint)
    fields = {name: value for name, value in state.items() if name not in (CHECKPOINT_ID, CONFIG_DIGEST)}
    valid_loss = fields.get("valid_loss")
    if isinstance(valid_loss, float) and not math.isfinite(valid_loss):
        fields["valid_loss"] = None  # as version 0.2 and before stored it
    annotations = annotations_of(RunProgress)
    try:
        reject_unknown("state", fields, annotations)
        progress = RunProgress(
            **{name: convert(name, value, annotations[name]) for name, value in fields.items()}
        )
    except SoliError as error:
        raise SoliError(f"{file}: {error}; {REMOVE}") from None
    if NAME.fullmatch(checkpoint.name) and progress.step != _step_of(checkpoint):
        raise SoliError(f"{file} is the state of step {progress.step}, not of {checkpoint.name}; {REMOVE}")
    return progress


def read_state(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / "state.json"
    try:
        state = parse_json(read_text(file), str(file), finite=False)
        if not isinstance(state, dict):
            raise SoliError(f"{file}: must hold a JSON object, not {kind_of(state)}")
    except SoliError as error:
        raise SoliError(f"{error}; {REMOVE}") from None
    return state


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` latest, the best and stages' ends."""
    saved = checkpoints(run)
    retained = {*saved[-keep:], *stage_ends(saved), best_checkpoint(run)}
    for checkpoint in saved:
        if checkpoint not in retained:
            remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; killed half-way, it leaves a hidden folder, as an unfinished save does."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(hidden)
    remove(hidden)


def document_digest(document: dict[str, Any]) -> str:
    """SHA-256 of a JSON document, whatever its spacing and the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
