"""Reasoning separated from the answer, as R1-style models write it: `<think>` reasoning `</think>` answer.

The prompt may already end inside the reasoning (R1's template ends with `<think>`). White space around the delimiters
belongs to neither part. A text that never closes its reasoning has no answer.
"""

from typing import Literal

from soli.chat.delimiters import safe_length

OPEN, CLOSE = "<think>", "</think>"


def ends_in_reasoning(prompt: str) -> bool:
    """Whether the answer to this rendered prompt starts inside the reasoning."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningSplitter:
    """Splits a streamed text into reasoning and answer, independently of how the text is cut into chunks.

    `starts_inside`: the prompt ended with `<think>`, so the first token is reasoning already.
    """

    def __init__(self, starts_inside: bool) -> None:
        self._state: Literal["start", "reasoning", "answer"] = "reasoning" if starts_inside else "start"
        self._buffer = ""
        self._strip_leading = True  # until this part has emitted text

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        """The reasoning and the answer that this chunk completes; either may be "". `last`: no chunk follows."""
        self._buffer += text
        if self._state == "start":
            self._detect_open(last)
        reasoning = self._push_reasoning(last) if self._state == "reasoning" else ""
        answer = self._emit(len(self._buffer)) if self._state == "answer" else ""
        return reasoning, answer

    def _detect_open(self, last: bool) -> None:
        start = self._buffer.lstrip()
        if start.startswith(OPEN):
            self._buffer = start[len(OPEN) :]
            self._state = "reasoning"
        elif last or not OPEN.startswith(start):
            self._state = "answer"
            self._strip_leading = False  # an answer without reasoning keeps its white space

    def _push_reasoning(self, last: bool) -> str:
        reasoning, delimiter, answer = self._buffer.partition(CLOSE)
        if not delimiter:
            length = len(reasoning) if last else safe_length(reasoning, CLOSE)
            return self._emit(len(reasoning[:length].rstrip()))
        emitted = self._emit(len(reasoning.rstrip()))
        self._buffer = answer
        self._state = "answer"
        self._strip_leading = True
        return emitted

    def _emit(self, length: int) -> str:
        """Takes `length` characters off the buffer, without the white space that starts a part."""
        emitted = self._buffer[:length]
        self._buffer = self._buffer[length:]
        if self._strip_leading:
            emitted = emitted.lstrip()
        self._strip_leading = self._strip_leading and not emitted
        return emitted
