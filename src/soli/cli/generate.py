"""`soli generate MODEL PROMPT`: continue a text with the model in a folder; the text is streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from soli.cli._shared import options, sampling_options
from soli.cli._shared.console import print_json, sanitize_for_terminal
from soli.cli._shared.text_input import argument_lines, stdin_lines
from soli.errors import SoliError

if TYPE_CHECKING:
    from soli.analysis.trace import TokenTrace
    from soli.engine.request import Answer

MAX_NEW_TOKENS = 256


def generate(
    model: Annotated[str, typer.Argument(help="A model folder; nano is the bundled model.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text appears; may be given several times.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    logprobs: options.Logprobs = None,
    experts: options.Experts = False,
    experts_detail: options.Detail = False,
    speculate: options.Speculate = False,
    json: options.Json = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
) -> None:
    """Continue a prompt. Only the continuation goes to standard output."""
    text = "\n".join(stdin_lines() if prompt == "-" else argument_lines(prompt, "the prompt"))
    if not text.strip():
        raise SoliError("the prompt is empty: give some text to continue")
    from soli.cli._shared import expert_tables, logprob_tables
    from soli.engine.engine import Engine
    from soli.engine.offline import limits_for, stream
    from soli.engine.request import Answer, Request
    from soli.engine.sampler import SamplingParams
    from soli.engine.text_model import open_text_model

    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=sampling_options.logit_bias(logit_bias or ()),
        seed=seed,
    )
    constraint = sampling_options.constraint_spec(json_schema, regex)
    text_model = open_text_model(model, device, dtype, mtp=speculate)
    prompt_ids = text_model.text_prompt(text)
    remaining = text_model.remaining_tokens(prompt_ids, "the prompt")
    request = Request(
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=min(remaining, MAX_NEW_TOKENS) if max_new_tokens is None else max_new_tokens,
        sampling=sampling,
        stop_ids=text_model.stop_ids,
        stop=tuple(stop or ()),
        logprobs=logprobs,
        trace=experts or experts_detail,
        constraint=constraint,
    )
    longest = len(prompt_ids) + request.max_new_tokens
    engine = Engine(text_model, limits_for(text_model, 1, longest, speculate=speculate))
    events = []
    for event in stream(engine, request):
        events.append(event)
        if not json:
            print(sanitize_for_terminal(event.text), end="", flush=True)
    answer = Answer.from_events(request, events)
    trace = expert_tables.token_traces(text_model, answer) if answer.routing is not None else None
    entries = None if answer.logprobs is None else logprob_tables.as_json(text_model, answer.logprobs)
    if json:
        _print_json(text, answer, trace, entries)
        return
    print(flush=True)
    if entries is not None:
        print("", *logprob_tables.lines(entries), sep="\n")
    if trace is not None:
        print()
        expert_tables.show(trace, experts_detail)


def _print_json(
    prompt: str, answer: Answer, trace: list[TokenTrace] | None, logprobs: list[dict[str, Any]] | None
) -> None:
    from soli.cli._shared import expert_tables

    entry: dict[str, Any] = {
        "prompt": prompt,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.usage.prompt,
        "new_tokens": answer.usage.completion,
    }
    if logprobs is not None:
        entry["logprobs"] = logprobs
    if trace is not None:
        entry["experts"] = expert_tables.as_json(trace)
    print_json(entry)
