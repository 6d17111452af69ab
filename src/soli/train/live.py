"""A run as a few lines at the foot of the terminal, redrawn in place: progress, losses, speed, and load by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from soli.train.balance import ExpertLoad
from soli.train.checkpoints import RunProgress
from soli.train.schedule import stage_name

EIGHTHS = " ▏▎▍▌▋▊▉"
WIDTH = 10  # cells of a bar
FULL_VIOLATION = 2.0  # where its bar is full: an expert with three times its share
MOST_LAYERS = 12  # beyond, the worst are shown


@dataclass
class LiveView:
    """What is on the screen; the loop changes it, rich draws it."""

    total: int  # tokens of the whole run
    step: int = 0
    tokens: int = 0
    stage: int = 0
    figures: dict[str, float] = field(default_factory=dict)  # loss, mtp, lr, norm, tokens_per_second
    loads: dict[str, ExpertLoad] = field(default_factory=dict)
    heldout: str = ""
    left: str = "?"
    skipped: int = 0  # steps that moved nothing

    def move(self, progress: RunProgress, figures: dict[str, float], loads: dict[str, ExpertLoad], left: str) -> None:
        """Show another step; `left` is the time until the end of the run."""
        self.step, self.tokens, self.stage = progress.step, progress.tokens, progress.stage
        self.figures, self.loads, self.left = figures, loads, left

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress()]
        if self.figures:
            parts.append(self._losses())
        if self.loads:
            parts.append(self._layers())
        return Group(*parts)

    def _progress(self) -> Table:
        row = Table.grid(padding=(0, 2))
        done = f"{self.tokens / 1e6:,.2f} of {self.total / 1e6:,.2f} M tokens"
        share = f"{100 * self.tokens / self.total:3.0f} %"
        step = f"{stage_name(self.stage)}, step {self.step:,}" if self.stage else f"step {self.step:,}"
        row.add_row(share, ProgressBar(self.total, self.tokens, width=30), step, done, f"{self.left} left")
        return row

    def _losses(self) -> Table:
        figures = self.figures
        cells = {"loss": f"{figures['loss']:.4f}", "mtp": f"{figures['mtp']:.4f}"}
        cells |= {"held-out bits/byte": self.heldout} if self.heldout else {}
        cells |= {"tok/s": f"{figures['tokens_per_second']:,.0f}", "lr": f"{figures['lr']:.2e}"}
        cells |= {"norm": f"{figures['norm']:.2f}"}
        cells |= {"skipped": f"{self.skipped}"} if self.skipped else {}
        row = Table.grid(padding=(0, 3))
        row.add_row(*(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in cells.items()))
        return row

    def _layers(self) -> Table:
        worst = sorted(self.loads, key=lambda name: -self.loads[name].max_violation)[:MOST_LAYERS]
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
        table.add_column(
            "layer" if len(worst) == len(self.loads) else f"worst {MOST_LAYERS} of {len(self.loads)} layers"
        )
        for title in ("max violation", "entropy", "idle experts"):
            table.add_column(title, no_wrap=True)
        for name, load in self.loads.items():
            if name in worst:
                violation = f"{bar(load.max_violation / FULL_VIOLATION)} {load.max_violation:5.2f}"
                idle = f"{'▪' * min(load.idle, WIDTH):<{WIDTH}} {load.idle:3d}"
                table.add_row(name, violation, f"{bar(load.entropy)} {load.entropy:.3f}", idle)
        return table


def bar(share: float) -> str:
    """A bar of WIDTH cells, `share` of it filled to an eighth of a cell; full from 1 on."""
    eighths = round(8 * WIDTH * min(max(share, 0.0), 1.0))
    whole, part = divmod(eighths, 8)
    return ("█" * whole + (EIGHTHS[part] if part else "")).ljust(WIDTH)
