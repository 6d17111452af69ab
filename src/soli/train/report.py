"""What a run says: aligned lines, or on a terminal a view redrawn in place; and the same figures in metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live

from soli.train.anomalies import Anomaly
from soli.train.balance import ExpertLoad
from soli.train.checkpoints import RunProgress
from soli.train.evaluate import Evaluation
from soli.train.live import LiveView
from soli.train.metrics import MetricsFile
from soli.train.schedule import stage_name


class RunReport:
    """A run's voice. `total` counts tokens; a run that goes on after `progress` goes on in its metrics file.

    `work_left` weighs what lies ahead of a progress, for the time left; None: each token takes as long.
    """

    def __init__(
        self,
        run: Path,
        total: int,
        progress: RunProgress,
        console: Console | None = None,
        tensorboard: bool = False,
        work_left: Callable[[RunProgress], float] | None = None,
    ) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.work_left = work_left or (lambda progress: total - progress.tokens)
        self.work, self.began = self.work_left(progress), time.monotonic()
        self.metrics = MetricsFile(run, progress.step, tensorboard)
        self.view = LiveView(total, progress.step, progress.tokens, progress.stage)
        self.open = ExitStack()

    def __enter__(self) -> RunReport:
        self.open.callback(self.metrics.close)
        if self.console.is_terminal:
            self.open.enter_context(Live(self.view, console=self.console, refresh_per_second=2))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open.close()

    def say(self, line: str) -> None:
        """Print one line, on a terminal above the view."""
        self.console.print(line, markup=False)

    def step(self, progress: RunProgress, figures: dict[str, float], loads: dict[str, ExpertLoad], speak: bool) -> None:
        """One optimizer step, shown in the view; when `speak`, it is recorded and, where there is no view, printed."""
        left, self.view.skipped = self._left(progress), progress.skipped
        self.view.move(progress, figures, loads, left)
        if not speak:
            return
        if not self.console.is_terminal:
            self._print_step(progress, figures, loads, left)
        layers = {name: vars(load) for name, load in loads.items()}
        self.record("step", progress, {**figures, "load": layers})

    def _print_step(
        self, progress: RunProgress, figures: dict[str, float], loads: dict[str, ExpertLoad], left: str
    ) -> None:
        violation = max((load.max_violation for load in loads.values()), default=0.0)
        idle = sum(load.idle for load in loads.values())
        skipped = f"skipped {progress.skipped}  " if progress.skipped else ""
        self.say(
            f"step {progress.step:>6}{_stage(progress)}  tokens {progress.tokens / 1e6:>8.2f} M  "
            f"loss {figures['loss']:.4f}  mtp {figures['mtp']:.4f}  lr {figures['lr']:.2e}  "
            f"norm {figures['norm']:.2f}  violation {violation:.2f}  idle {idle}  {skipped}"
            f"{figures['tokens_per_second']:>7,.0f} tok/s  {left} left"
        )

    def trouble(self, progress: RunProgress, trouble: Anomaly, loss: float, norm: float) -> None:
        """A spike, or a step that was skipped, whether or not it is the turn of a line."""
        kind = "skip" if trouble.rule == "skip" else trouble.kind
        self.say(f"{'skipped' if kind == 'skip' else kind}: {trouble.why}")
        figures = {"loss": loss, "norm": norm}
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self.record(kind, progress, {**finite, "why": trouble.why, "layer": trouble.layer, "skipped": progress.skipped})

    def evaluation(
        self, progress: RunProgress, result: Evaluation, samples: list[tuple[str, str]], seconds: float
    ) -> None:
        """Held-out figures and sample translations."""
        mtp = "" if result.mtp_accuracy is None else f"  mtp hits {100 * result.mtp_accuracy:.1f} %"
        self.view.heldout = bits = f"{result.bits_per_byte:.4f}"
        where = f"held-out at step {progress.step}{_stage(progress)}"
        self.say(f"{where}: loss {result.loss:.4f}  {bits} bits/byte{mtp}  ({seconds:.1f} s)")
        for text, translation in samples:
            self.say(f"    {text}  ->  {translation}")
        self.record("evaluation", progress, {**vars(result), "samples": samples})

    def end(self, progress: RunProgress, why: str) -> None:
        """Why the sitting ended, for whoever asks later where the run stands."""
        self.record("end", progress, {"why": why})

    def record(self, kind: str, progress: RunProgress, figures: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        head = {"kind": kind, "step": progress.step, "tokens": progress.tokens, "stage": progress.stage}
        head["seconds"] = progress.seconds
        self.metrics.write({**head, **figures})

    def _left(self, progress: RunProgress) -> str:
        left = self.work_left(progress)
        done = self.work - left
        if done <= 0:
            return "?"
        seconds = int(left * (time.monotonic() - self.began) / done)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}" if seconds > 0 else "0:00:00"


def _stage(progress: RunProgress) -> str:
    return f"  {stage_name(progress.stage)}" if progress.stage else ""
