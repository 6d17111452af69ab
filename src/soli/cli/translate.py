"""`soli translate TEXT`: English to Chinese or back with the bundled model; `-` reads lines from stdin."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soli.cli._shared import options
from soli.cli._shared.console import print_json
from soli.cli._shared.loading import load_text_model, note_memory, note_paging
from soli.cli._shared.ranks import join_first_rank, started_ranks
from soli.cli._shared.text_input import argument_lines, stdin_lines
from soli.errors import SoliError

if TYPE_CHECKING:
    from soli.eval.translation import Translation, Translator


def translate(
    ctx: typer.Context,
    text: Annotated[str, typer.Argument(help="What to translate; - reads standard input, a line each.")],
    to: Annotated[str | None, typer.Option(help="en or zh; by default whichever the text is not in.")] = None,
    model: Annotated[str, typer.Option(help="A model folder; nano is the bundled model.")] = "nano",
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = None,
    beams: options.Beams = None,
    length_penalty: options.LengthPenalty = None,
    max_new_tokens: options.MaxNewTokens = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Lines translated together.")] = 32,
    experts: options.Experts = False,
    experts_detail: options.Detail = False,
    speculate: options.Speculate = False,
    json: options.Json = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    threads: options.Threads = None,
    processes: options.Processes = None,
) -> None:
    """Translate between English and Chinese. Standard output gets the translation alone, line for line."""
    join_first_rank(model, device, dtype, speculate, memory, threads)
    if to not in (None, "en", "zh"):
        raise SoliError(f"cannot translate to {to!r}: choose en or zh")
    if started_ranks(ctx, model, processes):
        return
    if speculate and (beams or 1) > 1:
        raise SoliError("--speculate drafts for one beam: leave it out, or give --beams 1")
    lines = stdin_lines() if text == "-" else argument_lines(text, "the text")
    from soli.engine.sampler import SamplingParams
    from soli.eval.translation import Translator, translation_beams

    options.use_threads(threads)
    text_model = load_text_model(model, device, dtype, speculate, memory)
    translator = Translator(
        text_model=text_model,
        to=to,  # type: ignore[arg-type]
        sampling=SamplingParams(temperature, top_k, top_p, seed),
        max_new_tokens=max_new_tokens,
        trace=experts or experts_detail,
        batch_size=batch_size,
        speculate=speculate,
        beam_search=translation_beams(text_model, beams, length_penalty, speculate or temperature > 0),
    )
    note_memory(translator.text_model)
    # A person typing line after line wants each answer at once.
    window = 1 if text == "-" and sys.stdin.isatty() else None
    for translation in translator.translate(lines, window):
        _print(translator, translation, json, experts_detail)
    stats = translator.stats()
    note_paging(stats.paging, stats.prompt_tokens + stats.completion_tokens)


def _print(translator: Translator, translation: Translation, as_json: bool, detail: bool) -> None:
    from soli.cli._shared import expert_tables

    answer = translation.answer
    trace = expert_tables.token_traces(translator.text_model, answer) if translator.trace and answer else None
    if not as_json:
        print(translation.text, flush=True)
        if trace is not None:
            expert_tables.show(trace, detail)
        return
    entry: dict[str, Any] = {
        "source": translation.source,
        "translation": translation.text,
        "to": translation.to,
        "finish_reason": answer.finish_reason if answer else None,
        "prompt_tokens": answer.usage.prompt if answer else 0,
        "new_tokens": answer.usage.completion if answer else 0,
    }
    if trace is not None:
        entry["experts"] = trace
    print_json(entry)
