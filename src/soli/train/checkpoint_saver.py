"""Saving a run while it goes on: its state is copied to host memory, and another thread brings the copy to disk.

The training thread waits for the copy alone, and for an earlier save that is still being written: there is one at a
time. torch.distributed.checkpoint decides which process writes what; the folder gets its name from the first of them,
when the files of all are on disk. Older checkpoints go after that, never before.
"""

from __future__ import annotations

import dataclasses
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from soli.checkpoint.writer import write_json
from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.train.checkpoint_storage import StateWriter, expect_one_process, flush
from soli.train.checkpoints import RunProgress, prune, remove, run_state, sweep
from soli.train.optimizer import Optimizer


class CheckpointSaver:
    """Saves one run. Every process of the run makes one and calls it at the same steps."""

    def __init__(self, run: Path, keep: int) -> None:
        """`keep`: how many of the latest checkpoints stay, beside the best."""
        self.run, self.keep = run, keep
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self.pending: Future[Any] | None = None
        self.buffers: dict[MetadataIndex, Tensor] = {}
        # a group of its own: its messages must not meet those of the training thread
        self.group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        expect_one_process()

    def save(self, model: Transformer, optimizer: Optimizer, progress: RunProgress) -> None:
        """Begin to save the state after `progress.step` steps. SoliError when the save before it failed."""
        self.wait()
        plan = _Staged(run_state(model, optimizer), self.buffers)
        documents = {"config.json": model.config.to_dict(), "state.json": dataclasses.asdict(progress)}
        folder = _Folder(self.run, f"step-{progress.step:08d}", documents, self.keep)
        self.pending = self.thread.submit(self._write, plan, folder)

    def check(self) -> None:
        """SoliError when the save under way has failed by now."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the save under way is on disk. SoliError when it could not be brought there."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except SoliError:
            if value is None:  # else the first failure is the one to tell
                raise
        finally:
            self.thread.shutdown()

    def _write(self, plan: _Staged, folder: _Folder) -> None:
        try:
            writer = StateWriter(folder.draft, folder.begin, folder.end)
            dcp.save({}, storage_writer=writer, planner=plan, process_group=self.group)
        except dcp.CheckpointException as error:
            shutil.rmtree(folder.draft, ignore_errors=True)
            cause = next(iter(error.failures.values()))[0]
            reason = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
            raise SoliError(
                f"{folder.final} could not be written ({reason}), so training stopped; the checkpoints before it are "
                "whole: make room and run the same command again"
            ) from None


class _Staged(dcp.DefaultSavePlanner):
    """A plan made, and its tensors copied, in the training thread; to be carried out in another.

    `buffers` are host memory, made at the first save and used again by the next; pinned where the tensors are on a GPU.
    """

    def __init__(self, state: dict[str, Tensor], buffers: dict[MetadataIndex, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        super().set_up_planner(state)
        self.local, self.buffers, on_gpu = super().create_local_plan(), buffers, False
        for item in self.local.items:
            tensor = super().lookup_object(item.index)
            buffer = buffers.get(item.index)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffers[item.index] = buffer
            buffer.copy_(tensor.detach(), non_blocking=True)
            on_gpu = on_gpu or tensor.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        self.state_dict = {}  # the tensors themselves are no longer needed

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> dcp.SavePlan:
        return self.local

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.buffers[index]


@dataclasses.dataclass(frozen=True)
class _Folder:
    """One checkpoint's folder: hidden while it is being filled, renamed when all of it is on disk."""

    run: Path
    name: str
    documents: dict[str, dict[str, Any]]
    keep: int

    @property
    def final(self) -> Path:
        return self.run / "checkpoints" / self.name

    @property
    def draft(self) -> Path:
        return self.final.with_name(f".{self.name}")

    def begin(self) -> None:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        sweep(self.run)
        self.draft.mkdir()

    def end(self) -> None:
        for name, document in self.documents.items():
            write_json(self.draft / name, document)
            flush(self.draft / name)
        flush(self.draft)
        if self.final.exists():
            remove(self.final)
        self.draft.rename(self.final)
        flush(self.final.parent)
        prune(self.run, self.keep)
