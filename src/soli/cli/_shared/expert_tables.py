"""How the command line shows the experts: as a table on the terminal."""

from collections.abc import Sequence

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
    """Prints an empty line and a trace: coloured when standard output is a terminal, plain when it is not."""
    print()
    (print_detail if detail else print_table)(stdout_console(), trace)
