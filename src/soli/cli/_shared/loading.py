"""Models for the verbs that compute: loaded behind a progress bar, and how fast they answered."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from soli.cli._shared import options
from soli.cli._shared.progress import ProgressBar

if TYPE_CHECKING:
    from soli.engine.text_model import TextModel
    from soli.experts.paging_stats import PagingStats
    from soli.llm import LLM


def load_text_model(model: str, device: str, dtype: str, mtp: bool = False, memory: str | None = None) -> TextModel:
    """`open_text_model`, whose progress is shown once it takes long."""
    from soli.engine.text_model import open_text_model

    with ProgressBar(f"loading {model}", unit="bytes") as bar:
        return open_text_model(model, device, dtype, mtp, bar.update, options.memory_bytes(memory))


def load_llm(model: str, device: str, dtype: str, memory: str | None = None) -> LLM:
    """`soli.LLM`, likewise."""
    from soli.llm import LLM

    with ProgressBar(f"loading {model}", unit="bytes") as bar:
        llm = LLM(model, device=device, dtype=dtype, progress=bar.update, memory=options.memory_bytes(memory))
    note_memory(llm.text_model)
    return llm


def note_memory(text_model: TextModel) -> None:
    """How the memory of a model is divided whose experts are read from disk, once its engine is made: a line."""
    if text_model.budget is not None:
        print(f"soli: {text_model.budget}", file=sys.stderr)


def note_paging(paging: PagingStats | None, tokens: int) -> None:
    """Of a model whose experts are read from disk, how many were in memory and what was read: a line."""
    if paging is not None:
        print(f"soli: {paging.summary(tokens)}", file=sys.stderr)


class Stopwatch:
    """The time of one answer: started before the prompt is read, told of each piece that arrives."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._first: float | None = None
        self._last = self._start

    def lap(self) -> None:
        """A piece has arrived."""
        self._last = time.monotonic()
        if self._first is None:
            self._first = self._last

    def summary(self, prompt_tokens: int, new_tokens: int) -> str:
        """One line: tokens of the answer and per second after the first, tokens of the prompt and the wait for it."""
        first = self._last if self._first is None else self._first
        line = f"{new_tokens:,} tokens"
        if new_tokens > 1 and self._last > first:
            line += f", {(new_tokens - 1) / (self._last - first):,.1f} tokens/s"
        return f"{line}; the first after {first - self._start:.2f} s, {prompt_tokens:,} tokens of prompt"
