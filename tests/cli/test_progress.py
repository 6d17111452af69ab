"""The progress display: drawn on a terminal once the work lasts, silent elsewhere, a line for each finished step."""

import io

import pytest
from rich.console import Console

from soli.cli._shared import progress
from soli.cli._shared.progress import ProgressBar, StepReport


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, highlight=False)


@pytest.mark.parametrize(
    ("terminal", "delay", "is_drawn"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
)
def test_a_bar_is_drawn_on_a_terminal_after_the_delay(monkeypatch, terminal, delay, is_drawn):
    monkeypatch.setattr(progress, "DELAY_SECONDS", delay)
    for unit, show in (("items", lambda bar: bar.advance(3)), ("bytes", lambda bar: bar.update(3, 9))):
        screen = console(terminal)
        with ProgressBar("reading [texts]", 9, unit, console=screen) as bar:
            show(bar)
        output = screen.file.getvalue()
        assert ("3/9" in output and "reading [texts]" in output) == is_drawn and bool(output) == is_drawn


def test_a_bar_is_erased_when_the_work_fails(monkeypatch):
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    screen = console(True)
    with pytest.raises(ValueError), ProgressBar("reading", 9, console=screen) as bar:
        bar.advance(1)
        raise ValueError
    assert screen.file.getvalue().endswith("\x1b[2K")


def test_steps_print_a_line_each_when_they_end(capsys):
    with StepReport() as steps:
        steps.report("games", "fetching")
        steps.report("games", "12,345 rows [all]")
    assert capsys.readouterr().err.split() == ["0", "s", "games", "12,345", "rows", "[all]"]
    with StepReport(quiet=True) as steps:
        steps.report("games", "12 rows")
    assert capsys.readouterr().err == ""
