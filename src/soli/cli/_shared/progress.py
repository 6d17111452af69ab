"""The progress display of every verb, on standard error: drawn on a terminal once the work has lasted two seconds."""

import time
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from soli.cli._shared.console import stderr_console

DELAY_SECONDS = 2.0  # without a display

Unit = Literal["items", "bytes", "steps"]

COLUMNS: dict[Unit, tuple[type[ProgressColumn], ...]] = {
    "items": (BarColumn, MofNCompleteColumn, TimeRemainingColumn),
    "bytes": (BarColumn, DownloadColumn, TransferSpeedColumn, TimeRemainingColumn),
    "steps": (SpinnerColumn,),  # how long a step takes is not known
}


class ProgressBar:
    """A bar of `total` items or bytes, or a spinner of named steps; erased when the `with` block ends."""

    def __init__(
        self, title: str, total: int | None = None, unit: Unit = "items", console: Console | None = None
    ) -> None:
        self.console = console or stderr_console()
        columns = [TextColumn("{task.description}", markup=False), *(column() for column in COLUMNS[unit])]
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(title, total=total)
        self._start_time = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._start_time

    def advance(self, count: int) -> None:
        """`count` more items are finished."""
        self._bar.advance(self._task, count)
        self._draw()

    def update(self, completed: int, total: int) -> None:
        """`completed` of `total` are finished."""
        self._bar.update(self._task, completed=completed, total=total)
        self._draw()

    def rename(self, title: str) -> None:
        """Show another step."""
        self._bar.update(self._task, description=title)
        self._draw()

    def _draw(self) -> None:
        if self.console.is_terminal and self.seconds > DELAY_SECONDS and not self._bar.live.is_started:
            self._bar.start()


class StepReport(ProgressBar):
    """A line on standard error for each finished step of a long job, and a spinner for the one under way."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__("starting", unit="steps", console=stderr_console(quiet))

    def report(self, name: str, event: str) -> None:
        """Take the report of a step: an event that ends in -ing is under way, any other is a result."""
        if event.endswith("ing"):
            self.rename(f"{name}: {event}")
        else:
            self.console.print(f"{self.seconds:5.0f} s  {name:<24} {escape(event)}")
