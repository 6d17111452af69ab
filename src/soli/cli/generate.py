"""`soli generate MODEL PROMPT`: continue a text with the model in a folder; the text streams as it comes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soli.cli._shared import options, sampling_options
from soli.cli._shared.text_input import argument_lines, stdin_lines
from soli.errors import SoliError

if TYPE_CHECKING:
    from soli.analysis.trace import TokenTrace
    from soli.engine.generate import Generation

MOST_NEW_TOKENS = 256


def generate(
    model: Annotated[str, typer.Argument(help="A model folder; nano is the model in the box.")],
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
    json: options.Json = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
) -> None:
    """Continue a prompt. Only the continuation goes to standard output."""
    text = "\n".join(stdin_lines() if prompt == "-" else argument_lines(prompt, "the prompt"))
    if not text.strip():
        raise SoliError("the prompt is empty: give some text to continue")
    from soli.cli._shared import expert_tables, logprob_tables
    from soli.engine.constraint import Constraints
    from soli.engine.detokenizer import TextStream, token_text
    from soli.engine.generate import generate as run
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
    spec = sampling_options.constraint_spec(json_schema, regex)
    text_model = open_text_model(model, device, dtype)
    prompt_ids = text_model.text_prompt(text)
    stream = TextStream(token_text(text_model.tokenizer), stop or ())

    def on_token(_: int, token: int) -> bool:
        piece = stream.push(token)
        if not json:
            print(harmless(piece), end="", flush=True)
        return stream.stopped

    room = text_model.room(prompt_ids, "the prompt")
    [generation] = run(
        text_model.model,
        [prompt_ids],
        max_new_tokens=min(room, MOST_NEW_TOKENS) if max_new_tokens is None else max_new_tokens,
        sampling=sampling,
        stop_ids=text_model.stop_ids,
        on_token=on_token,
        trace=experts or experts_detail,
        logprobs=logprobs,
        constraints=[Constraints.of(text_model).open(spec)] if spec else None,
    )
    rest = stream.finish()
    trace = expert_tables.traced(text_model, prompt_ids, generation) if generation.routing is not None else None
    listed = logprob_tables.as_json(text_model, generation.logprobs) if logprobs is not None else None
    if json:
        _print_json(text, stream.text, prompt_ids, generation, trace, listed)
        return
    print(harmless(rest), flush=True)
    if listed is not None:
        print("", *logprob_tables.lines(listed), sep="\n")
    if trace is not None:
        print()
        expert_tables.show(trace, experts_detail)


def harmless(text: str) -> str:
    """The text as a terminal may have it: control characters but tab and newline are left out there, kept in a pipe."""
    if not sys.stdout.isatty():
        return text
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def _print_json(
    prompt: str,
    text: str,
    prompt_ids: list[int],
    generation: Generation,
    trace: list[TokenTrace] | None,
    logprobs: list[dict[str, Any]] | None,
) -> None:
    from soli.cli._shared import expert_tables

    found: dict[str, Any] = {"prompt": prompt, "text": text, "finish_reason": generation.finish_reason}
    found["prompt_tokens"], found["new_tokens"] = len(prompt_ids), len(generation.ids)
    if logprobs is not None:
        found["logprobs"] = logprobs
    if trace is not None:
        found["experts"] = expert_tables.as_json(trace)
    expert_tables.print_json(found)
