"""Saving a run: a checkpoint is written to a hidden folder and renamed when every byte is on disk.

A killed run so leaves either a complete checkpoint or a folder whose name begins with a dot, which the next run
removes. Rejected: a weight, bias or moment that is not finite.

Saving hardly stops training: the state is copied to host memory, and another thread writes the copy. The training
thread waits for the copy, and for an earlier save that is still being written: there is one at a time. The first
process renames the folder when the files of all are on disk. Older checkpoints are removed after that, never before.
"""

import dataclasses
import os
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from soli.atomic_file import remove, sync
from soli.checkpoint.writer import write_json
from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.train.checkpoint_storage import StateWriter, allow_one_process
from soli.train.checkpoints import run_state
from soli.train.finite import NotFinite, reject_nonfinite, resume_advice
from soli.train.optimizer import Optimizer
from soli.train.run_folder import CHECKPOINT_ID, CONFIG_DIGEST, RunProgress, document_digest, prune, remove_checkpoint
from soli.train.run_lock import RunIsLocked, RunLock, create_folder, lock_run


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
        identity = {CHECKPOINT_ID: uuid.uuid4().hex, CONFIG_DIGEST: document_digest(config)}
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
            writer = StateWriter(folder.draft, create, folder.commit, document_digest(folder.state))
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
