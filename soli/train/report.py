"""What a run says: aligned lines on the terminal, a progress bar below them, and the same figures in metrics.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from soli.train.balance import Load
from soli.train.evaluate import Evaluation
from soli.train.state import Progress as RunProgress


class Report:
    """A run's voice. `total` and `start` count tokens; metrics are appended: a resumed run goes on in its file."""

    def __init__(self, run: Path, total: int, start: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.total, self.start, self.began = total, start, time.monotonic()
        self.file = (run / "metrics.jsonl").open("a", encoding="utf-8")
        columns = (TextColumn("{task.percentage:>3.0f} %"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=total, completed=start)

    def __enter__(self) -> Report:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        self.file.close()

    def say(self, line: str) -> None:
        """Print one line above the progress bar."""
        self.console.print(line, markup=False)

    def step(self, progress: RunProgress, figures: dict[str, float], loads: dict[str, Load], speak: bool) -> None:
        """One optimizer step: move the bar; when `speak`, print and record its figures."""
        self.bar.update(self.task, completed=progress.tokens)
        if not speak:
            return
        violation = max((load.max_violation for load in loads.values()), default=0.0)
        idle = sum(load.idle for load in loads.values())
        self.say(
            f"step {progress.step:>6}  tokens {progress.tokens / 1e6:>8.2f} M  loss {figures['loss']:.4f}  "
            f"mtp {figures['mtp']:.4f}  lr {figures['lr']:.2e}  norm {figures['norm']:.2f}  "
            f"violation {violation:.2f}  idle {idle}  {figures['tokens_per_second']:>7,.0f} tok/s  "
            f"{self._left(progress)} left"
        )
        layers = {name: vars(load) for name, load in loads.items()}
        self.record("step", progress, {**figures, "load": layers})

    def evaluation(
        self, progress: RunProgress, result: Evaluation, samples: list[tuple[str, str]], seconds: float
    ) -> None:
        """Held-out figures and sample translations."""
        mtp = "" if result.mtp_accuracy is None else f"  mtp hits {100 * result.mtp_accuracy:.1f} %"
        self.say(
            f"held-out at step {progress.step}: loss {result.loss:.4f}  {result.bits_per_byte:.4f} bits/byte{mtp}  "
            f"({seconds:.1f} s)"
        )
        for text, translation in samples:
            self.say(f"    {text}  ->  {translation}")
        self.record("evaluation", progress, {**vars(result), "samples": samples})

    def record(self, kind: str, progress: RunProgress, figures: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        entry = {"kind": kind, "step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds, **figures}
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.file.flush()

    def _left(self, progress: RunProgress) -> str:
        done = progress.tokens - self.start
        if done <= 0:
            return "?"
        seconds = int((self.total - progress.tokens) * (time.monotonic() - self.began) / done)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}" if seconds > 0 else "0:00:00"
