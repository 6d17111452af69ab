"""How the command line shows the experts: as a table on the terminal, or as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from soli.analysis.trace import TokenTrace, trace_tokens
from soli.analysis.trace_view import print_detail, print_table
from soli.cli._shared.console import stdout_console
from soli.engine.request import Answer
from soli.engine.text_model import TextModel


def token_traces(text_model: TextModel, answer: Answer) -> list[TokenTrace]:
    """The trace of one prompt and its answer; empty for a model without routed experts."""
    tokens = [*answer.prompt_ids, *answer.ids]
    labels = [text_model.label(token) for token in tokens]
    routers = [(name, moe.gate) for name, moe in text_model.model.moe_layers()]
    return trace_tokens(routers, answer.routing or (), tokens, labels, len(answer.prompt_ids))


def show(trace: Sequence[TokenTrace], detail: bool) -> None:
    """Prints a trace to standard output: coloured when that is a terminal, plain when it is not."""
    (print_detail if detail else print_table)(stdout_console(), trace)


def as_json(trace: Sequence[TokenTrace]) -> list[dict[str, Any]]:
    """The trace as plain lists and dicts, field for field as in soli/analysis/trace.py."""
    return [dataclasses.asdict(token) for token in trace]
