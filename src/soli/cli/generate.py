"""`soli generate MODEL PROMPT`: continue a text with the model in a folder; the text is streamed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soli.cli._shared import options
from soli.cli._shared.console import print_json, sanitize_for_terminal
from soli.cli._shared.loading import Stopwatch, load_text_model, note_memory, note_paging
from soli.cli._shared.ranks import join_first_rank, started_ranks
from soli.cli._shared.text_input import argument_lines, stdin_lines
from soli.errors import SoliError
from soli.input_files import open_regular

if TYPE_CHECKING:
    from soli.analysis.trace import TokenTrace
    from soli.engine.constraint import ConstraintSpec
    from soli.engine.request import Answer
    from soli.engine.sampler import TokenLogprob
    from soli.engine.text_model import TextModel
    from soli.experts.paging_stats import PagingStats

MAX_NEW_TOKENS = 256
MAX_FILE_BYTES = 262_144  # bytes: four for each character that a schema may have


def generate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder; nano is the bundled model.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 selects the most likely token; higher values sample more evenly. By default this and the next four "
            "are as in the model's generation_config.json, where it has them; else 0."
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many most likely tokens; 0 from all.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most likely tokens that hold this share of the probability; 1 from all."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop tokens below this share, 0 to 1, of the most likely one's probability; 0 drops none."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="0.1 to 10: above 1, tokens of prompt and answer become less likely; 1 is off."),
    ] = None,
    presence_penalty: Annotated[
        float,
        typer.Option(help="-2 to 2, subtracted from the logit of a token that is already in the answer; 0 is off."),
    ] = 0.0,
    frequency_penalty: Annotated[
        float,
        typer.Option(help="-2 to 2, subtracted from a token's logit for each occurrence in the answer; 0 is off."),
    ] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN=NUMBER", help="Add -100 to 100 to a token's logit; may be given several times."),
    ] = None,
    seed: options.Seed = None,
    parse_special: Annotated[
        bool,
        typer.Option(
            "--parse-special",
            help="Names of special tokens in the prompt are these tokens: for fill-in-the-middle and rendered prompts.",
        ),
    ] = False,
    json_schema: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write JSON that fits the schema in this file, or nothing.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Write a text that matches this whole regular expression.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text appears; may be given several times.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="Show each token's log-probability, and this many most likely tokens.")
    ] = None,
    experts: options.Experts = False,
    experts_detail: options.Detail = False,
    speculate: options.Speculate = False,
    json: options.Json = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    forget: options.Forget = False,
    threads: options.Threads = None,
    processes: options.Processes = None,
) -> None:
    """Continue a prompt. Only the continuation goes to standard output."""
    join_first_rank(model, device, dtype, speculate, memory, threads)
    text = "" if prompt == "-" else _prompt_text(prompt)
    from soli.cli._shared import expert_tables
    from soli.engine.engine import Engine
    from soli.engine.offline import limits_for, stream
    from soli.engine.request import Answer, Request
    from soli.engine.sampling_defaults import sampling_params

    values = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": _logit_biases(logit_bias or ()),
        "seed": seed,
    }
    sampling_params(values, {})  # rejects before the model is read
    constraint = _constraint_spec(json_schema, regex)
    if started_ranks(ctx, model, processes):
        return
    text = text or _prompt_text(prompt)  # standard input is the first rank's
    options.use_threads(threads)
    options.forget_usage(model, forget)
    text_model = load_text_model(model, device, dtype, speculate, memory)
    prompt_ids = text_model.text_prompt(text, parse_special)
    remaining = text_model.remaining_tokens(prompt_ids, "the prompt")
    request = Request(
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=min(remaining, MAX_NEW_TOKENS) if max_new_tokens is None else max_new_tokens,
        sampling=sampling_params(values, text_model.sampling_defaults),
        stop_ids=text_model.stop_ids,
        stop=tuple(stop or ()),
        logprobs=logprobs,
        trace=experts or experts_detail,
        constraint=constraint,
    )
    longest = len(prompt_ids) + request.max_new_tokens
    engine = Engine(text_model, limits_for(text_model, 1, longest, speculate=speculate))
    note_memory(text_model)
    events = []
    stopwatch = Stopwatch()
    for event in stream(engine, request):
        stopwatch.lap()
        events.append(event)
        if not json:
            print(sanitize_for_terminal(event.text), end="", flush=True)
    answer = Answer.from_events(request, events)
    trace = expert_tables.token_traces(text_model, answer) if answer.routing is not None else None
    entries = None if answer.logprobs is None else _logprob_entries(text_model, answer.logprobs)
    if json:
        _print_json(text, answer, trace, entries, engine.stats().paging)
        return
    print(flush=True)
    print(f"soli: {stopwatch.summary(answer.usage.prompt, answer.usage.completion)}", file=sys.stderr)
    note_paging(engine.stats().paging, answer.usage.prompt + answer.usage.completion)
    if entries is not None:
        print("", *_logprob_lines(entries), sep="\n")
    if trace is not None:
        expert_tables.show(trace, experts_detail)


def _prompt_text(prompt: str) -> str:
    """An argument as text, or standard input."""
    text = "\n".join(stdin_lines() if prompt == "-" else argument_lines(prompt, "the prompt"))
    if not text.strip():
        raise SoliError("the prompt is empty: give some text to continue")
    return text


def _logit_biases(entries: Sequence[str]) -> dict[int, float]:
    """Reads `["506=-100", "12=2.5"]`; a token's id, then what is added to its logit."""
    biases: dict[int, float] = {}
    for entry in entries:
        token, _, bias = entry.partition("=")
        try:
            number, value = int(token), float(bias)
        except ValueError:
            raise SoliError(f"--logit-bias {entry!r} is not TOKEN=NUMBER: write for instance 506=-100") from None
        if number in biases:
            raise SoliError(f"--logit-bias names token {number} twice: name it once")
        biases[number] = value
    return biases


def _constraint_spec(json_schema: str | None, regex: str | None) -> ConstraintSpec | None:
    """What the text must be, by a file with a JSON schema or by a regular expression; None where neither is given."""
    if json_schema is not None and regex is not None:
        raise SoliError("--json-schema and --regex cannot hold together: give one of them")
    if json_schema is None and regex is None:
        return None
    from soli.engine.constraint import ConstraintSpec

    if json_schema is None:
        return ConstraintSpec.regex(regex or "")
    with open_regular(json_schema) as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise SoliError(f"{json_schema} is longer than the limit of {MAX_FILE_BYTES:,} bytes for a schema")
    try:
        return ConstraintSpec.json_schema(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise SoliError(f"{json_schema} is not valid UTF-8: convert it to UTF-8") from None


def _logprob_entries(text_model: TextModel, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Per token its id, text and log-probability, and under "top" the likeliest tokens with theirs."""
    return [
        {
            **_token_entry(text_model, entry.token, entry.logprob),
            "top": [_token_entry(text_model, *pair) for pair in entry.top],
        }
        for entry in logprobs
    ]


def _logprob_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The same, one line per token; texts in quotes, unprintable characters escaped."""
    rows = []
    for entry in entries:
        top = "  ".join(f"{token['text']!r} {token['logprob']:.2f}" for token in entry["top"])
        rows.append(f"{entry['token']:>7} {entry['logprob']:>8.2f}  {entry['text']!r:<12}  {top}".rstrip())
    return rows


def _token_entry(text_model: TextModel, token: int, logprob: float) -> dict[str, Any]:
    return {"token": token, "text": text_model.tokenizer.token_text(token), "logprob": logprob}


def _print_json(
    prompt: str,
    answer: Answer,
    trace: list[TokenTrace] | None,
    logprobs: list[dict[str, Any]] | None,
    paging: PagingStats | None,
) -> None:
    entry: dict[str, Any] = {
        "prompt": prompt,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.usage.prompt,
        "new_tokens": answer.usage.completion,
    }
    if paging is not None:
        entry["paging"] = paging.to_dict()
    if logprobs is not None:
        entry["logprobs"] = logprobs
    if trace is not None:
        entry["experts"] = trace
    print_json(entry)
