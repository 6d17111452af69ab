"""Reasoning apart from the answer, as R1-style models write it: `<think>` reasoning `</think>` answer.

The prompt may end inside the reasoning already (R1's template ends with `<think>`). White space around the marks
belongs to neither part. A text that never leaves its reasoning has no answer.
"""

from soli.chat.delimiters import settled

OPEN, CLOSE = "<think>", "</think>"


def ends_thinking(prompt: str) -> bool:
    """Whether the answer to this rendered prompt begins inside the reasoning."""
    return prompt.rstrip().endswith(OPEN)


class ThinkSplit:
    """Splits a text that comes in pieces. `inside`: the prompt ended with <think>, the model thinks already.

    The two parts do not depend on how the text was cut.
    """

    def __init__(self, inside: bool) -> None:
        self._state = "thinking" if inside else "start"
        self._held = ""
        self._fresh = True  # nothing of this part was given out yet

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        """The reasoning and the answer that this piece settles; either may be "". `last`: no other comes."""
        self._held += text
        if self._state == "start":
            self._start(last)
        thought = self._reasoning(last) if self._state == "thinking" else ""
        return thought, self._given(len(self._held)) if self._state == "answer" else ""

    def _start(self, last: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._held, self._state = begun[len(OPEN) :], "thinking"
        elif last or not OPEN.startswith(begun):
            self._state, self._fresh = "answer", False  # an answer without reasoning keeps its white space

    def _reasoning(self, last: bool) -> str:
        thought, mark, answer = self._held.partition(CLOSE)
        if not mark:
            cut = len(thought) if last else settled(thought, CLOSE)
            return self._given(len(thought[:cut].rstrip()))
        thought = self._given(len(thought.rstrip()))
        self._held, self._state, self._fresh = answer, "answer", True
        return thought

    def _given(self, count: int) -> str:
        """The first `count` held characters, without white space at the part's beginning."""
        given, self._held = self._held[:count], self._held[count:]
        if self._fresh:
            given = given.lstrip()
        self._fresh = self._fresh and not given
        return given
