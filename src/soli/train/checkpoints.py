"""A run's folder and its checkpoints: everything that resuming needs, nothing pickled, complete or not there.

runs/NAME/
  run.lock               who trains here (soli/train/run_lock.py)
  recipe.resolved.json   the recipe with every default, as the run began
  metrics.jsonl          one line per report and per evaluation
  checkpoints/step-00000200/  model.safetensors, optimizer.safetensors, config.json, state.json

A checkpoint is written to a hidden folder and renamed when every byte is on disk, so a killed run leaves either a
complete one or a folder whose name begins with a dot, which the next run removes. Tensors have Soli's parameter names,
moments `<parameter>|<moment>`, whichever process holds which chunk (soli/train/checkpoint_storage.py). Tensor files
have the digest of state.json, which has a random id and the digest of config.json.

Rejected, when saving as when loading: a weight, bias or moment that is not finite. Rejected when loading: files of
another checkpoint.

Saving hardly stops training: the state is copied to host memory, and another thread writes the copy. The training
thread waits for the copy, and for an earlier save that is still being written: there is one at a time. The first
process renames the folder when the files of all are on disk. Older checkpoints are removed after that, never before.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from soli.atomic_file import remove, sync
from soli.checkpoint.name_map import Slot
from soli.checkpoint.save import save_slots
from soli.checkpoint.writer import Target, write_json
from soli.config import load_config
from soli.errors import SoliError
from soli.input_files import kind_of, parse_json, read_object, read_text
from soli.model.transformer import Transformer
from soli.sections import NonNegativeInt, annotations_of, convert, reject_unknown
from soli.train.checkpoint_storage import StateReader, StateWriter, allow_one_process, check_shapes, load, read_region
from soli.train.optimizer import Optimizer
from soli.train.run_lock import RunIsLocked, RunLock, create_folder, lock_run

EXPORT_ATTEMPTS = 5  # with another checkpoint each, where the run removed one while it was read
REMOVE = "remove this checkpoint to resume from the one before"
CHECKPOINT_ID = "checkpoint_id"  # keys of state.json beside the progress; version 0.2 and before wrote none
CONFIG_DIGEST = "config_sha256"
NAME = re.compile(r"step-([0-9]{8,})")
RNG = "torch_rng"  # of process 0; of process n with the suffix .n
CUDA_RNG = "cuda_rng"


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
    saved = []
    for path in checkpoints(run):
        try:
            saved.append((read_progress(path), path))
        except SoliError:
            if path.is_dir():
                raise  # else the running process removed it after the list was made
    stage = max((progress.stage for progress, _ in saved), default=0)
    evaluated = [(p.valid_loss, path) for p, path in saved if p.stage == stage and p.valid_loss is not None]
    if evaluated:
        return min(evaluated)[1]
    return saved[-1][1] if saved else None


def require_best_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run; SoliError where it has none."""
    checkpoint = best_checkpoint(run)
    if checkpoint is None:
        raise SoliError(f"{run} holds no checkpoint; give the folder of a run of soli train")
    return checkpoint


def stage_ends(saved: list[Path]) -> list[Path]:
    """The last checkpoint of each stage but the latest, of checkpoints in the order of their steps."""
    stages = [read_progress(path).stage for path in saved]
    return [path for path, stage, later in zip(saved, stages, stages[1:], strict=False) if stage < later]


def read_progress(checkpoint: Path) -> RunProgress:
    """`state.json` of a checkpoint; SoliError when it cannot be read or is of another step."""
    file = checkpoint / "state.json"
    state = _read_state(checkpoint)
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


def _read_state(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / "state.json"
    try:
        state = parse_json(read_text(file), str(file), finite=False)
        if not isinstance(state, dict):
            raise SoliError(f"{file}: must hold a JSON object, not {kind_of(state)}")
    except SoliError as error:
        raise SoliError(f"{error}; {REMOVE}") from None
    return state


class CheckpointSaver:
    """Saves one run. Every process of the run creates one and calls it at the same steps."""

    def __init__(self, run: Path, keep: int) -> None:
        """`keep`: how many of the latest checkpoints are kept, beside the best."""
        self.run = run
        self.keep = keep
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self.pending: Future[Any] | None = None
        self.buffers: dict[MetadataIndex, Tensor] = {}
        self.lock: RunLock | None = None  # of the first process
        # A process group of its own: its messages must not mix with those of the training thread.
        self.group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        allow_one_process()

    def save(self, model: Transformer, optimizer: Optimizer, progress: RunProgress) -> None:
        """Start saving the state after `progress.step` steps. SoliError when the save before it failed."""
        self.wait()
        plan = _StagedPlan(run_state(model, optimizer), self.buffers)
        config = model.config.to_dict()
        identity = {CHECKPOINT_ID: uuid.uuid4().hex, CONFIG_DIGEST: _digest(config)}
        state = dataclasses.asdict(progress) | identity
        folder = _CheckpointFolder(self.run, f"step-{progress.step:08d}", config, state, self.keep)
        self.pending = self.thread.submit(self._write, plan, folder)

    def check(self) -> None:
        """SoliError when the pending save has failed by now."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the pending save is on disk. SoliError when it could not be written."""
        pending = self.pending
        self.pending = None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.wait()
        except SoliError:
            if error is None:  # otherwise the first error is the one to report
                raise
        finally:
            self.thread.shutdown()

    def _write(self, plan: "_StagedPlan", folder: "_CheckpointFolder") -> None:
        def create() -> None:
            self.lock = lock_run(self.run)  # the one this process has, unless someone removed the run's folder
            folder.create()

        try:
            writer = StateWriter(folder.draft, create, folder.commit, _digest(folder.state))
            dcp.save({}, storage_writer=writer, planner=plan, process_group=self.group)
        except dcp.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if not isinstance(cause, RunIsLocked):  # else what is there belongs to another process
                with suppress(OSError):
                    remove(folder.draft)
            raise SoliError(_explain_failure(cause, folder)) from None


def _explain_failure(cause: BaseException, folder: "_CheckpointFolder") -> str:
    """Why a checkpoint was not saved, and what to do."""
    if isinstance(cause, NotFinite):
        return f"{cause}, so {folder.final} was not written and training stopped; {resume_advice(folder.run)}"
    if isinstance(cause, SoliError):
        return f"{folder.final} could not be written, so training stopped: {cause}"
    reason = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
    return (
        f"{folder.final} could not be written ({reason}), so training stopped; the checkpoints before it are complete: "
        "free some space and run the same command again"
    )


class NotFinite(SoliError):
    """A tensor of a run's state holds NaN or infinity."""


def reject_nonfinite(state: Iterable[tuple[str, Tensor]]) -> None:
    """NotFinite with the name of the first floating-point tensor that holds NaN or infinity."""
    for name, tensor in state:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not local.is_floating_point() or not local.numel():
            continue
        lowest, highest = local.detach().aminmax()  # NaN where there is one; no copy of the tensor
        if not (lowest.isfinite() and highest.isfinite()):
            raise NotFinite(f"{name} holds values that are not finite")


def resume_advice(run: Path) -> str:
    """The last checkpoint whose tensors are all finite, and how to resume from it; the end of a sentence."""
    later: list[Path] = []
    for checkpoint in reversed(checkpoints(run)):
        if _is_finite(checkpoint):
            removed = f"remove {' and '.join(map(str, reversed(later)))}, then " if later else ""
            return (
                f"the last finite checkpoint is {checkpoint}: to resume from it {removed}run soli train again with a "
                "lower schedule.learning_rate (--set)"
            )
        later.append(checkpoint)
    return "there is no finite checkpoint: start again in another --out with a lower schedule.learning_rate (--set)"


def _is_finite(checkpoint: Path) -> bool:
    try:
        reader = StateReader(checkpoint, ("model", "optimizer"))
        reject_nonfinite((name, shard.tensor(name)) for shard in set(reader.shards.values()) for name in shard.entries)
    except SoliError:
        return False
    return True


class _StagedPlan(dcp.DefaultSavePlanner):
    """A save plan whose tensors are copied in the training thread and written in another.

    `buffers` are host memory, allocated at the first save and reused; pinned where the tensors are on a GPU.
    """

    def __init__(self, state: dict[str, Tensor], buffers: dict[MetadataIndex, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        super().set_up_planner(state)
        self.local = super().create_local_plan()
        self.buffers = buffers
        for item in self.local.items:
            tensor = super().lookup_object(item.index)
            buffer = buffers.get(item.index)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffers[item.index] = buffer
            buffer.copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into pinned memory have only been started
        self.state_dict = {}  # the tensors are no longer needed

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> dcp.SavePlan:
        reject_nonfinite((item.index.fqn, self.buffers[item.index]) for item in self.local.items)
        return self.local

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.buffers[index]


@dataclass(frozen=True)
class _CheckpointFolder:
    """One checkpoint's folder: hidden while it is being written, renamed when all of it is on disk."""

    run: Path
    name: str
    config: dict[str, Any]
    state: dict[str, Any]
    keep: int

    @property
    def final(self) -> Path:
        return self.run / "checkpoints" / self.name

    @property
    def draft(self) -> Path:
        return self.final.with_name(f".{self.name}")

    def create(self) -> None:
        create_folder(self.final.parent)
        for unfinished in self.final.parent.glob(".step-*"):  # of killed runs
            remove(unfinished)
        self.draft.mkdir()

    def commit(self) -> None:
        for name, document in (("config.json", self.config), ("state.json", self.state)):
            write_json(self.draft / name, document)
            sync(self.draft / name)
        sync(self.draft)
        if os.path.lexists(self.final):
            remove_checkpoint(self.final)
        self.draft.rename(self.final)
        sync(self.final.parent)
        prune(self.run, self.keep)


def load_checkpoint(
    checkpoint: Path, model: Transformer, optimizer: Optimizer, late_mtp: bool = False
) -> RunProgress:
    """Restore model, optimizer and random state; SoliError names the tensor that does not fit.

    With `late_mtp` it may be of a time when the MTP modules were not trained yet. Any number of processes may have
    saved. One that had no counterpart then gets the random state of the first.
    """
    reader = StateReader(checkpoint, ("model", "optimizer"))
    _check_identity(reader)
    weights = _weights(reader, model)
    moments = {f"optimizer/{name}": tensor for name, tensor in _empty_moments(reader, optimizer, model).items()}
    random_states = {
        name: torch.empty(reader.tensors[name].size, dtype=torch.uint8) for name in _random_state_names(reader, model)
    }
    load(reader, weights | moments | random_states)
    _check_finite(checkpoint, weights | moments)
    optimizer.load_state({name.removeprefix("optimizer/"): tensor for name, tensor in moments.items()}, late_mtp)
    for name, random_state in random_states.items():
        if name.startswith(f"optimizer/{RNG}"):
            torch.set_rng_state(random_state)
        else:
            torch.cuda.set_rng_state(random_state, model.embed_tokens.weight.device)
    return read_progress(checkpoint)


def load_weights(checkpoint: Path, model: Transformer) -> None:
    """Fill a model's parameters and router biases (fp32) from a checkpoint."""
    reader = StateReader(checkpoint, ("model",))
    _check_identity(reader)
    weights = _weights(reader, model)
    load(reader, weights)
    _check_finite(checkpoint, weights)


def load_run(run: Path) -> Transformer:
    """The best model of a run, fp32 on the CPU, for export and evaluation."""
    checkpoint = require_best_checkpoint(run)
    model = Transformer(load_config(checkpoint), dtype=torch.float32)
    load_weights(checkpoint, model)
    return model


def export_run(run: Path, folder: Path, format: str) -> None:
    """Write the best checkpoint of a run as a model folder, whichever number of processes saved it, tensor by tensor.

    The run may go on meanwhile; a checkpoint that it removes is given up for a later one. SoliError names what does not
    fit or is not finite; nothing is left at `folder` then.
    """
    for _ in range(EXPORT_ATTEMPTS):
        checkpoint = require_best_checkpoint(run)
        try:
            return _export_checkpoint(checkpoint, run, folder, format)
        except SoliError:
            if checkpoint.is_dir():
                raise
    raise SoliError(f"{run}: its process removes checkpoints before they are read; raise run.keep, or stop it first")


def _export_checkpoint(checkpoint: Path, run: Path, folder: Path, format: str) -> None:
    reader = StateReader(checkpoint, ("model",))
    _check_identity(reader)
    config = load_config(checkpoint)
    check_shapes(reader, _weights(reader, Transformer(config, device="meta", dtype=torch.float32)))

    def fetch(slot: Slot) -> Tensor:
        name = f"model/{slot.soli}"
        if name not in reader.tensors and config.tie_word_embeddings:
            name = "model/embed_tokens.weight"
        size = reader.tensors[name].size
        if slot.expert is None:
            values = read_region(reader, name, [0] * len(size), size)
        else:
            values = read_region(reader, name, [slot.expert, slot.first_row, 0], [1, slot.shape[0], size[2]])[0]
        _check_finite(checkpoint, {slot.soli: values})
        return values

    name = run.resolve().name
    save_slots(config, fetch, folder, Target(format), run, source=f"{name}, a run of soli train")


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


def model_state(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors as `model/name`, parameters and persistent buffers; a tied head is left out."""
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("model/lm_head.weight", None)
    return state


def run_state(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything but the progress, by full name: the model, the optimizer's moments, this process's random state."""
    state = model_state(model) | {f"optimizer/{name}": tensor for name, tensor in optimizer.state().items()}
    state[f"optimizer/{RNG}{_rank_suffix()}"] = torch.get_rng_state()
    device = model.embed_tokens.weight.device
    if device.type == "cuda":
        state[f"optimizer/{CUDA_RNG}{_rank_suffix()}"] = torch.cuda.get_rng_state(device)
    return state


def _check_identity(reader: StateReader) -> None:
    """SoliError when tensors, state.json and config.json are not of one checkpoint; older versions' have no digests."""
    state = _read_state(reader.folder)
    expected = _digest(state) if CHECKPOINT_ID in state else None
    for file, digest in reader.state_digests.items():
        if digest != expected:
            raise SoliError(f"{reader.folder / 'state.json'} does not belong to {file.name} beside it; {REMOVE}")
    config_file = reader.folder / "config.json"
    if expected is not None and state.get(CONFIG_DIGEST) != _digest(read_object(config_file)):
        raise SoliError(f"{config_file} is not the one that was saved with this checkpoint; {REMOVE}")


def _digest(document: dict[str, Any]) -> str:
    """SHA-256 of a JSON document, whatever its spacing and the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _check_finite(checkpoint: Path, state: dict[str, Tensor]) -> None:
    try:
        reject_nonfinite(state.items())
    except NotFinite as error:
        raise SoliError(f"{checkpoint}: {error}; {resume_advice(checkpoint.parent.parent)}") from None


def _weights(reader: StateReader, model: Transformer) -> dict[str, Tensor]:
    state = model_state(model)
    stored = {name for name in reader.tensors if name.startswith("model/")}
    if unknown := stored - state.keys():
        unknown -= model_state(_skeleton(model)).keys()  # of the layers that another process has
    if unknown:
        name = next(name for name in reader.tensors if name in unknown)
        raise SoliError(f"{reader.folder} has {name}, which the recipe's model lacks")
    return state


def _skeleton(model: Transformer) -> Transformer:
    """The whole model of which this process may have some layers, without memory."""
    return Transformer(model.config, device="meta", dtype=torch.float32)


def _empty_moments(reader: StateReader, optimizer: Optimizer, model: Transformer) -> dict[str, Tensor]:
    """An empty tensor per moment of the checkpoint that this process needs: a shard where the parameter is one, else
    whole, on the CPU."""
    parameters = {name: p for p, name in optimizer.names.items()}
    of_others = {name for name, _ in _skeleton(model).named_parameters()} - parameters.keys()
    moments: dict[str, Tensor] = {}
    for full, stored in reader.tensors.items():
        part, _, name = full.partition("/")
        if part == "optimizer" and not name.startswith((RNG, CUDA_RNG)):
            parameter = name.rpartition("|")[0]
            if parameter in of_others:
                continue
            p = parameters.get(parameter)
            if isinstance(p, DTensor) and p.shape == stored.size:
                moments[name] = torch.empty_like(p, dtype=stored.properties.dtype)
            else:
                moments[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    return moments


def _random_state_names(reader: StateReader, model: Transformer) -> list[str]:
    """Full names of the random states that this process restores."""
    kinds = (RNG, CUDA_RNG) if model.embed_tokens.weight.device.type == "cuda" else (RNG,)
    candidates = ((f"optimizer/{kind}{_rank_suffix()}", f"optimizer/{kind}") for kind in kinds)
    return [next(name for name in pair if name in reader.tensors) for pair in candidates if pair[1] in reader.tensors]


def _rank_suffix() -> str:
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return f".{rank}" if rank else ""
