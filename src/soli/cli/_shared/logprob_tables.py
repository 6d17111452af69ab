"""How the command line shows log-probabilities: a line per token on the terminal, or as JSON."""

from collections.abc import Sequence
from typing import Any

from soli.engine.logprobs import TokenLogprob
from soli.engine.text_model import TextModel


def as_json(text_model: TextModel, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Per token its number, text and log-probability, and under "top" the likeliest tokens with theirs."""
    return [
        _entry(text_model, one.token, one.logprob) | {"top": [_entry(text_model, *pair) for pair in one.top]}
        for one in logprobs
    ]


def lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The same, one line per token; texts in quotes, what a terminal could not show escaped."""
    shown = []
    for one in entries:
        others = "  ".join(f"{other['text']!r} {other['logprob']:.2f}" for other in one["top"])
        shown.append(f"{one['token']:>7} {one['logprob']:>8.2f}  {one['text']!r:<12}  {others}".rstrip())
    return shown


def _entry(text_model: TextModel, token: int, logprob: float) -> dict[str, Any]:
    return {"token": token, "text": text_model.tokenizer.token_text(token), "logprob": logprob}
