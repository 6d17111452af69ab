"""Log-probabilities in the output of the command line: a line per token, or JSON."""

from collections.abc import Sequence
from typing import Any

from soli.engine.distribution import TokenLogprob
from soli.engine.text_model import TextModel


def as_json(text_model: TextModel, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Per token its id, text and log-probability, and under "top" the likeliest tokens with theirs."""
    return [
        _entry(text_model, entry.token, entry.logprob) | {"top": [_entry(text_model, *pair) for pair in entry.top]}
        for entry in logprobs
    ]


def lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The same, one line per token; texts in quotes, unprintable characters escaped."""
    rows = []
    for entry in entries:
        top = "  ".join(f"{token['text']!r} {token['logprob']:.2f}" for token in entry["top"])
        rows.append(f"{entry['token']:>7} {entry['logprob']:>8.2f}  {entry['text']!r:<12}  {top}".rstrip())
    return rows


def _entry(text_model: TextModel, token: int, logprob: float) -> dict[str, Any]:
    return {"token": token, "text": text_model.tokenizer.token_text(token), "logprob": logprob}
