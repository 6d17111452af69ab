"""`soli chat [MODEL]`: talk with a chat-tuned model in the terminal; the conversation is kept until /reset."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soli.cli._shared import options
from soli.cli._shared.console import sanitize_for_terminal
from soli.cli._shared.loading import Stopwatch, load_llm
from soli.cli._shared.ranks import join_first_rank
from soli.errors import SoliError

if TYPE_CHECKING:
    from soli.chat.templates import ChatTemplate
    from soli.engine.request import Usage
    from soli.engine.sampler import SamplingParams
    from soli.experts.paging_stats import PagingStats
    from soli.llm import LLM

HELP = "/reset clears the conversation, /exit (or Ctrl-D) leaves; Ctrl-C stops an answer"
TEMPERATURE, TOP_P = 0.6, 0.95  # for a model without defaults of its own
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def chat(
    model: Annotated[str, typer.Argument(help="A model folder with a chat template.")] = "nano",
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    chat_template: options.ChatTemplate = None,
    temperature: Annotated[
        float | None, typer.Option(help="As of soli generate; by default as generation_config.json says, else 0.6.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Likewise; else 0.95.")] = None,
    seed: options.Seed = None,
    max_new_tokens: options.MaxNewTokens = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    forget: options.Forget = False,
    threads: options.Threads = None,
) -> None:
    """Chat with a model. Answers go to standard output; reasoning (R1) is shown dim, on a terminal only."""
    join_first_rank(model, device, dtype, memory=memory, threads=threads)
    from soli.engine.sampling_defaults import sampling_params

    values = {"temperature": temperature, "top_p": top_p, "seed": seed}
    sampling_params(values, {})  # rejects before a model is read
    options.use_threads(threads)
    options.forget_usage(model, forget)
    llm, template = open_chat(model, device, dtype, memory, chat_template)
    defaults = llm.text_model.sampling_defaults
    sampling = sampling_params(values, defaults, temperature=TEMPERATURE, top_p=TOP_P)
    conversation = Conversation(llm, template, sampling, max_new_tokens, system)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())

        print(f"{model}: {HELP}")
    for line in _lines():
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            print(f"soli: there is no {line.split()[0]}: {HELP}", file=sys.stderr)
        elif line:
            _answer(conversation, line)


def open_chat(
    model: str, device: str, dtype: str, memory: str | None = None, file: Path | None = None
) -> tuple[LLM, ChatTemplate]:
    """The model and its chat template, or the one in `file`; SoliError, before any weight is read, for a model without
    one."""
    from soli.chat.templates import ChatTemplate
    from soli.checkpoint import open_checkpoint
    from soli.data.tokenizer import Tokenizer

    folder = open_checkpoint(model).folder
    template = ChatTemplate.from_folder(folder, Tokenizer.from_folder(folder), file)
    if template is None:
        raise SoliError(
            f"{model} has no chat template, so it was not trained to chat: use soli generate to continue a text, or "
            "soli translate"
        )
    return load_llm(model, device, dtype, memory), template


class Conversation:
    """The turns so far, and the model that answers the next. An answer that is interrupted is kept up to there; a
    message without any answer is removed."""

    def __init__(
        self, llm: LLM, template: ChatTemplate, sampling: SamplingParams, limit: int | None, system: str | None
    ) -> None:
        from soli.chat.parsers.families import REASONING

        self._llm, self._template, self._sampling, self._limit = llm, template, sampling, limit
        self.notes: list[str] = []  # how the last answer went, lines
        added_tokens = llm.text_model.tokenizer.added_tokens()
        self._visible_ids = frozenset(added_tokens[name] for name in REASONING if name in added_tokens)
        self._system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Removes all turns but the system message."""
        self.messages = list(self._system)

    def reply(self, text: str) -> Iterator[tuple[str, str]]:
        """Pieces of (reasoning, answer) to the next message. SoliError when the model has no positions left."""
        from soli.chat.parser import MessageParser
        from soli.engine.request import checked

        messages = [*self.messages, {"role": "user", "content": text}]
        ids, thinking = self._template.render(messages)
        limit = self._llm.text_model.remaining_tokens(ids, "the conversation")
        limit = limit if self._limit is None else min(limit, self._limit)
        parser = MessageParser(starts_in_reasoning=thinking)
        content = ""
        self.notes = []
        stopwatch = Stopwatch()
        before = self._llm.stats().paging
        try:
            request = self._llm.request(ids, self._sampling, max_new_tokens=limit)
            events = self._llm.engine.open(replace(request, visible_ids=self._visible_ids))
            for event in map(checked, events):
                stopwatch.lap()
                if event.usage is not None:
                    self.notes = [stopwatch.summary(event.usage.prompt, event.usage.completion)]
                    self.notes += self._paging_notes(before, event.usage)
                delta = parser.push(event.text, event.finish_reason is not None)
                content += delta.content
                yield delta.reasoning, delta.content
        finally:
            if content:
                self.messages = [*messages, {"role": "assistant", "content": content}]

    def _paging_notes(self, before: PagingStats | None, usage: Usage) -> list[str]:
        """What was read for an answer, where experts are on disk."""
        paging = self._llm.stats().paging
        if paging is None or before is None:
            return []
        return [paging.since(before).summary(usage.prompt - usage.cached + usage.completion)]


def _lines() -> Iterator[str]:
    """What a person types, a line each, until the end of input."""
    from soli.cli._shared.text_input import stdin_lines

    if not sys.stdin.isatty():
        yield from (line.strip() for line in stdin_lines())
        return
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _answer(conversation: Conversation, line: str) -> None:
    terminal = sys.stdout.isatty()
    try:
        for reasoning, answer in conversation.reply(line):
            if reasoning and terminal:
                print(f"{DIM}{sanitize_for_terminal(reasoning)}{PLAIN}", end="", flush=True)
            if answer:
                print(sanitize_for_terminal(answer), end="", flush=True)
    except (KeyboardInterrupt, SoliError) as error:
        if not sys.stdin.isatty():
            raise
        if isinstance(error, SoliError):
            print(f"soli: {error}; {HELP}", file=sys.stderr)
    print(flush=True)
    if sys.stdin.isatty():
        for note in conversation.notes:
            print(f"soli: {note}", file=sys.stderr)
