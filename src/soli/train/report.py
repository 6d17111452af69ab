"""What a run reports: lines in a pipe, a view redrawn in place on a terminal, and the same numbers in metrics.jsonl.

metrics.jsonl has one JSON object per line. A run resumed from an earlier checkpoint takes some steps a second time; the
lines of the first time are dropped, so that each step is recorded once. TensorBoard's event files, written on request,
hold the same numbers; TensorBoard itself hides events past the step at which a run resumes.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from io import FileIO, TextIOBase
from pathlib import Path
from typing import IO, Any, Self, cast

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from soli import machine
from soli.atomic_file import replace_file
from soli.errors import SoliError
from soli.input_files import read_lines
from soli.train.anomalies import Anomaly
from soli.train.balance import ExpertLoad
from soli.train.evaluate import Evaluation
from soli.train.run_folder import RunProgress
from soli.train.schedule import stage_name

TAG_GROUPS = {"step": "train", "evaluation": "held-out"}  # of TensorBoard's tags, by kind of line
EIGHTHS = " ▏▎▍▌▋▊▉"
WIDTH = 10  # cells of a bar
FULL_VIOLATION = 2.0  # at which its bar is full: an expert with three times its share
MAX_LAYERS = 12  # of a model with more, those with the largest violation are shown


class RunReport:
    """Reports one run. `total` counts the run's tokens; a resumed run continues its metrics file after `progress`.

    `work_left` weighs what remains after a progress, for the time left; None: each token takes equally long.
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
        self.console = console or Console(file=cast(IO[str], LastingStderr()), highlight=False, soft_wrap=True)
        self.work_left = work_left or (lambda progress: total - progress.tokens)
        self.work_at_start = self.work_left(progress)
        self.start = time.monotonic()
        self.metrics = MetricsFile(run, progress.step, tensorboard)
        self.view = LiveView(total, replace(progress))
        self.open = ExitStack()

    def __enter__(self) -> Self:
        self.open.callback(self.metrics.close)
        if self.console.is_terminal:
            self.open.enter_context(Live(self.view, console=self.console, refresh_per_second=2))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def print(self, line: str) -> None:
        """Print one line, on a terminal above the view."""
        self.console.print(line, markup=False)

    def step(
        self, progress: RunProgress, metrics: dict[str, float], loads: dict[str, ExpertLoad], log: bool = True
    ) -> None:
        """One optimizer step, shown in the view; with `log` recorded too and, where there is no view, printed."""
        time_left = self._time_left(progress)
        self.view.progress = replace(progress)  # the run's own changes before the next step
        self.view.metrics = metrics
        self.view.loads = loads
        self.view.time_left = time_left
        if not log:
            return
        if not self.console.is_terminal:
            self._print_step(progress, metrics, loads, time_left)
        self.record("step", progress, {**metrics, "load": {name: vars(load) for name, load in loads.items()}})

    def _print_step(
        self, progress: RunProgress, metrics: dict[str, float], loads: dict[str, ExpertLoad], time_left: str
    ) -> None:
        violation = max((load.max_violation for load in loads.values()), default=0.0)
        dead = sum(load.dead_experts for load in loads.values())
        skipped = f"skipped {progress.skipped}  " if progress.skipped else ""
        self.print(
            f"step {progress.step:>6}{_stage(progress)}  tokens {progress.tokens / 1e6:>8.2f} M  "
            f"loss {metrics['loss']:.4f}  mtp {metrics['mtp']:.4f}  lr {metrics['lr']:.2e}  "
            f"norm {metrics['norm']:.2f}  violation {violation:.2f}  dead {dead}  {skipped}"
            f"{metrics['tokens_per_second']:>7,.0f} tok/s  {time_left} left"
        )

    def anomaly(self, progress: RunProgress, anomaly: Anomaly, loss: float, norm: float) -> None:
        """A spike, or a step that was skipped; printed and recorded whatever `run.log_every` is."""
        kind = "skip" if anomaly.action == "skip" else anomaly.kind
        self.print(f"{'skipped' if kind == 'skip' else kind}: {anomaly.reason}")
        metrics = {
            "loss": loss if math.isfinite(loss) else None,
            "norm": norm if math.isfinite(norm) else None,
            "why": anomaly.reason,
            "layer": anomaly.layer,
            "skipped": progress.skipped,
        }
        self.record(kind, progress, metrics)

    def evaluation(
        self, progress: RunProgress, result: Evaluation, samples: list[tuple[str, str]], seconds: float
    ) -> None:
        """Held-out measurements and sample translations."""
        mtp = "" if result.mtp_accuracy is None else f"  mtp hits {100 * result.mtp_accuracy:.1f} %"
        if result.mtp_accepted is not None:
            mtp += f", accepted {100 * result.mtp_accepted:.1f} %"
        bits = f"{result.bits_per_byte:.4f}"
        self.view.heldout = bits
        where = f"held-out at step {progress.step}{_stage(progress)}"
        self.print(f"{where}: loss {result.loss:.4f}  {bits} bits/byte{mtp}  ({seconds:.1f} s)")
        for text, translation in samples:
            self.print(f"    {text}  ->  {translation}")
        self.record("evaluation", progress, {**vars(result), "samples": samples})

    def begin(self, progress: RunProgress, device: torch.device) -> None:
        """Record where a session runs: its numbers have the same bits on one type of processor alone."""
        where = {"processor": machine.processor().name, "threads": torch.get_num_threads(), "device": str(device)}
        self.record("begin", progress, where)

    def end(self, progress: RunProgress, reason: str) -> None:
        """Record why the session ended: `soli runs` reads it."""
        self.record("end", progress, {"why": reason})

    def record(self, kind: str, progress: RunProgress, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.metrics.write(
            {
                "kind": kind,
                "step": progress.step,
                "tokens": progress.tokens,
                "stage": progress.stage,
                "seconds": progress.seconds,
                **metrics,
            }
        )

    def _time_left(self, progress: RunProgress) -> str:
        remaining = self.work_left(progress)
        completed = self.work_at_start - remaining
        if completed <= 0:
            return "?"
        seconds = max(0, int(remaining * (time.monotonic() - self.start) / completed))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class LastingStderr(TextIOBase):
    """Standard error that may go away, as a terminal does when its window is closed: the run saves its state anyway."""

    def __init__(self) -> None:
        self.stream = sys.stderr

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


class SilentReport(RunReport):
    """Of a rank that is not the first: prints and records nothing."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def print(self, line: str) -> None:
        pass

    def step(self, *_: object, **__: object) -> None:
        pass

    def anomaly(self, *_: object) -> None:
        pass

    def evaluation(self, *_: object) -> None:
        pass

    def record(self, *_: object) -> None:
        pass


def _stage(progress: RunProgress) -> str:
    return f"  {stage_name(progress.stage)}" if progress.stage else ""


@dataclass
class LiveView:
    """The last lines of the terminal: progress, losses, speed, load by layer. RunReport updates it, rich draws it."""

    total: int  # tokens of the whole run
    progress: RunProgress = field(default_factory=RunProgress)
    metrics: dict[str, float] = field(default_factory=dict)  # loss, mtp, lr, norm, tokens_per_second
    loads: dict[str, ExpertLoad] = field(default_factory=dict)
    heldout: str = ""
    time_left: str = "?"  # until the end of the run

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress_row()]
        if self.metrics:
            parts.append(self._losses())
        if self.loads:
            parts.append(self._layers())
        return Group(*parts)

    def _progress_row(self) -> Table:
        progress = self.progress
        stage = f"{stage_name(progress.stage)}, " if progress.stage else ""
        row = Table.grid(padding=(0, 2))
        row.add_row(
            f"{100 * progress.tokens / self.total:3.0f} %",
            ProgressBar(self.total, progress.tokens, width=30),
            f"{stage}step {progress.step:,}",
            f"{progress.tokens / 1e6:,.2f} of {self.total / 1e6:,.2f} M tokens",
            f"{self.time_left} left",
        )
        return row

    def _losses(self) -> Table:
        metrics = self.metrics
        cells = {
            "loss": f"{metrics['loss']:.4f}",
            "mtp": f"{metrics['mtp']:.4f}",
            "held-out bits/byte": self.heldout,
            "tok/s": f"{metrics['tokens_per_second']:,.0f}",
            "lr": f"{metrics['lr']:.2e}",
            "norm": f"{metrics['norm']:.2f}",
            "skipped": str(self.progress.skipped or ""),
        }
        row = Table.grid(padding=(0, 3))
        row.add_row(*(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in cells.items() if value))
        return row

    def _layers(self) -> Table:
        worst = sorted(self.loads, key=lambda name: -self.loads[name].max_violation)[:MAX_LAYERS]
        names = "layer" if len(worst) == len(self.loads) else f"worst {MAX_LAYERS} of {len(self.loads)} layers"
        numbers = [Column(title, no_wrap=True) for title in ("max violation", "entropy", "dead experts")]
        table = Table(names, *numbers, box=None, padding=(0, 3, 0, 0), header_style="dim")
        for name, load in self.loads.items():
            if name in worst:
                violation = f"{bar(load.max_violation / FULL_VIOLATION)} {load.max_violation:5.2f}"
                dead = f"{'▪' * min(load.dead_experts, WIDTH):<{WIDTH}} {load.dead_experts:3d}"
                table.add_row(name, violation, f"{bar(load.entropy)} {load.entropy:.3f}", dead)
        return table


def bar(share: float) -> str:
    """A bar of WIDTH cells, `share` of it filled to an eighth of a cell; full from 1 on."""
    cells, eighths = divmod(round(8 * WIDTH * min(max(share, 0.0), 1.0)), 8)
    return ("█" * cells + (EIGHTHS[eighths] if eighths else "")).ljust(WIDTH)


class MetricsFile:
    """`metrics.jsonl` of a run that continues after `step`; with `tensorboard`, the same numbers in tensorboard/."""

    def __init__(self, run: Path, step: int, tensorboard: bool = False) -> None:
        self.events = _open_events(run / "tensorboard", step) if tensorboard else None
        self.path = run / "metrics.jsonl"
        self.file = _open_after(self.path, step)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line, and its numbers to the event file. SoliError where it cannot be: no part of it is left."""
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        length = os.fstat(self.file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self.file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(length)
            raise SoliError(
                f"{self.path} could not be written ({error.strerror or error}), so training stopped; every checkpoint "
                "is complete: free some space and run the same command again"
            ) from None
        if self.events is not None:
            for tag, value in scalars(entry):
                self.events.add_scalar(tag, value, entry["step"])

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()


def scalars(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of one line by tag: "train/loss", "held-out/loss", "max_violation/layers.1"."""
    group = TAG_GROUPS.get(entry["kind"])
    if group is None:
        return
    for name, value in entry.items():
        if isinstance(value, int | float) and name != "step":
            yield f"{group}/{name}", value
    for layer, load in entry.get("load", {}).items():
        for name, value in load.items():
            yield f"{name}/{layer}", value


def _open_after(file: Path, step: int) -> FileIO:
    """The file, open for appending, without lines past `step`, ends of sessions, and a line that a kill cut short."""
    if file.exists() and not file.is_file():
        raise SoliError(f"{file} is not a file; remove it, or choose another --out")
    if file.is_file():
        lines = [line for _, line in read_lines(file)]
        current = [line.removesuffix(b"\n") + b"\n" for line in lines if _is_current(line, step)]
        if current != lines:
            replace_file(file, b"".join(current))
    return FileIO(file, "a")


def _is_current(line: bytes, step: int) -> bool:
    try:
        entry = json.loads(line)
        return bool(entry["step"] <= step and entry["kind"] != "end")
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _open_events(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SoliError(
            "run.tensorboard is true, but there is no package tensorboard; install it with: pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1, flush_secs=30)
