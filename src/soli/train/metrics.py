"""Where a run's figures go: `metrics.jsonl`, one JSON object per line, and TensorBoard's event files when asked for.

A run resumed from an earlier checkpoint takes steps a second time; what was told of them before is dropped, so that
each step stands once. TensorBoard hides such events by itself, being told the step at which the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from soli.errors import SoliError

GROUPS = {"step": "train", "evaluation": "held-out"}  # of TensorBoard's tags


class MetricsFile:
    """`metrics.jsonl` of a run that goes on after `step`; with `tensorboard`, the same numbers in tensorboard/."""

    def __init__(self, run: Path, step: int, tensorboard: bool = False) -> None:
        self.events = _open_events(run / "tensorboard", step) if tensorboard else None
        self.file = _open_after(run / "metrics.jsonl", step)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line, and its numbers to the event file."""
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.file.flush()
        if self.events is not None:
            for tag, value in scalars(entry):
                self.events.add_scalar(tag, value, entry["step"])

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()


def scalars(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of one line by tag: "train/loss", "held-out/loss", "max_violation/layers.1"."""
    group = GROUPS.get(entry["kind"])
    if group is None:
        return
    for name, value in entry.items():
        if isinstance(value, int | float) and name != "step":
            yield f"{group}/{name}", value
    for layer, load in entry.get("load", {}).items():
        for name, value in load.items():
            yield f"{name}/{layer}", value


def _open_after(file: Path, step: int) -> TextIO:
    """The file, to be appended to, without lines past `step`, ends of sittings, and a line that a kill cut short."""
    if file.is_file():
        before = file.read_text(encoding="utf-8", errors="replace")
        kept = "".join(line + "\n" for line in before.split("\n") if _stands(line, step))
        if kept != before:
            draft = file.with_name(f".{file.name}")
            draft.write_text(kept, encoding="utf-8")
            os.replace(draft, file)
    return file.open("a", encoding="utf-8")


def _stands(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
        return bool(entry["step"] <= step and entry["kind"] != "end")
    except (ValueError, KeyError, TypeError):
        return False


def _open_events(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SoliError(
            "run.tensorboard is true, but there is no package tensorboard; install it with: pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1, flush_secs=30)
