"""From a body to the engine's requests: prompts as tokens, sampling, where to stop.

What the model cannot do is rejected with the name of the field that asks for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from soli.chat.parser import OutputParser, PlainParser
from soli.data.tokenizer import TextTooLong
from soli.engine.constraint import ConstraintSpec
from soli.engine.request import Request
from soli.engine.sampler import SamplingParams
from soli.engine.sampling_defaults import sampling_params
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.eval.translation import translation_request
from soli.serve.echo import PromptText
from soli.serve.errors import ApiError
from soli.serve.protocol_requests import (
    CompletionBody,
    GenerationBody,
    SoliOptions,
    TranslateBody,
)
from soli.serve.service import LoadedModel, ServiceLimits

# A text may become shorter before it is tokenized: white space, composition, reasoning that a template leaves out.
SHRINKS = 8
SAMPLING_FIELDS = {
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
}
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat may use all remaining tokens


@dataclass(frozen=True)
class RequestBatch:
    """The engine requests of one body: `choices_per_prompt` for each prompt, prompt by prompt."""

    requests: tuple[Request, ...]
    choices_per_prompt: int
    routing: Literal["none", "summary", "full"]
    param_names: Mapping[str, str]  # the body's names of the requests' fields, for rejections
    include_usage: bool = False  # in the last chunk of a stream
    new_parser: Callable[[], OutputParser] = PlainParser  # of a chat's answers, one for each
    prompt_texts: tuple[PromptText, ...] = ()  # where answers begin with their prompts


def completion_batch(body: CompletionBody, loaded: LoadedModel, limits: ServiceLimits) -> RequestBatch:
    """POST /v1/completions."""
    prompts: Any = body.prompt
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]
    check_choices(body, len(prompts), limits)
    _check_completion(body)
    max_prompt = longest_prompt(loaded, limits, body.max_tokens)
    prompt_ids = _completion_prompts(body, prompts, loaded.text_model, max_prompt)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    request = engine_request(body, max_tokens, format_constraint(body), loaded)
    logprobs = None if body.logprobs is False else body.logprobs
    prompt_logprobs = logprobs if body.echo else None
    if max_tokens == 0 and prompt_logprobs is None:
        prompt_logprobs = 0  # the engine computes a prompt without an answer for its log-probabilities alone
    request = replace(request, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    requests = [replace(request, prompt_ids=tuple(ids)) for ids in prompt_ids]
    names = param_names(body.soli, prompt_ids="prompt", constraint="response_format")
    if body.max_tokens is None:
        names["max_new_tokens"] = "prompt"  # too long for the default
    batch = request_batch(body, requests, names, loaded, limits)
    if not body.echo:
        return batch
    texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    tokenizer = loaded.text_model.tokenizer
    prompt_texts = [PromptText.of(ids, tokenizer, text) for ids, text in zip(prompt_ids, texts, strict=True)]
    return replace(batch, prompt_texts=tuple(prompt_texts))


def _check_completion(body: CompletionBody) -> None:
    """Rejects what OpenAI's completions can have and these cannot."""
    if body.suffix:
        raise ApiError(400, "a text is not completed towards a suffix here: leave suffix out", "suffix")
    if body.best_of not in (None, 1, body.n or 1):
        raise ApiError(400, "the best of several answers is not selected here: leave best_of out, or give n", "best_of")


def byte_count(text: str) -> int:
    return len(text.encode())


def _completion_prompts(
    body: CompletionBody, prompts: Sequence[str] | Sequence[list[int]], text_model: TextModel, max_tokens: int
) -> Sequence[list[int]]:
    """Token ids of prompts; texts are tokenized unless one is certain to be too long."""
    if not isinstance(prompts[0], str):
        return cast(Sequence[list[int]], prompts)
    texts = cast(Sequence[str], prompts)
    try:
        for text in texts:
            text_model.tokenizer.check_length("the prompt", byte_count(text), max_tokens)
        return text_tokens(text_model, texts, body.add_special_tokens, body.parse_special)
    except TextTooLong as error:
        raise ApiError(400, str(error), "prompt", "context_length_exceeded") from error
    except SoliError as error:
        raise ApiError(400, str(error), "prompt") from error


def text_tokens(
    text_model: TextModel, texts: Sequence[str], add_special_tokens: bool, parse_special: bool
) -> list[list[int]]:
    """The tokens of texts, with those that the tokenizer's files put around them or without. `parse_special`: names of
    added tokens in them are these tokens."""
    if add_special_tokens:
        return text_model.text_prompts(texts, parse_special)
    if parse_special:
        return [text_model.tokenizer.encode_spelled(text) for text in texts]
    return text_model.tokenizer.encode_batch(texts)


def translation_batch(body: TranslateBody, loaded: LoadedModel, limits: ServiceLimits) -> RequestBatch:
    """POST /soli/translate."""
    if not can_translate(loaded):
        raise ApiError(400, "this model was not trained to translate: use /v1/completions", "text")
    most_tokens = longest_prompt(loaded, limits) * SHRINKS
    try:
        loaded.text_model.tokenizer.check_length("the text", byte_count(body.text), most_tokens)
        prompt_ids, remaining_tokens = translation_request(loaded.text_model, body.text, body.to)
    except TextTooLong as error:
        raise ApiError(400, str(error), "text", "context_length_exceeded") from error
    except SoliError as error:
        raise ApiError(400, str(error), "text") from error
    request = Request(
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=body.max_tokens or remaining_tokens,
        sampling=SamplingParams(body.temperature, seed=body.seed),
        stop_ids=loaded.text_model.stop_ids,
        trace=body.soli.routing != "none",
        masked_experts=_masked_experts(body.soli),
    )
    names = param_names(body.soli, prompt_ids="text")
    if body.max_tokens is None:
        names["max_new_tokens"] = "text"
    return RequestBatch((request,), 1, body.soli.routing, names, True)


def can_translate(loaded: LoadedModel) -> bool:
    """Whether the model has the language tokens of a translation prompt."""
    return all(loaded.text_model.tokenizer.has_token(token) for token in ("<|en|>", "<|zh|>"))


def check_choices(body: GenerationBody, prompts: int, limits: ServiceLimits) -> None:
    """Rejects more answers than one request may have."""
    answers = (body.n or 1) * prompts
    if answers > limits.choices:
        raise ApiError(
            400,
            f"the request is for {answers} answers; the limit of this server is {limits.choices}",
            "prompt" if prompts > limits.choices or body.n in (None, 1) else "n",
        )


def longest_prompt(loaded: LoadedModel, limits: ServiceLimits, new_tokens: int | None = None) -> int:
    """How many tokens a prompt may have that at least one token follows, or none with `new_tokens` 0."""
    return min(limits.prompt_tokens, loaded.text_model.positions - (new_tokens != 0))


def request_batch(
    body: GenerationBody,
    prompts: Sequence[Request],
    param_names: Mapping[str, str],
    loaded: LoadedModel,
    limits: ServiceLimits,
    new_parser: Callable[[], OutputParser] = PlainParser,
) -> RequestBatch:
    choices = body.n or 1
    longest = max(len(request.prompt_ids) for request in prompts)
    max_tokens = longest_prompt(loaded, limits, prompts[0].max_new_tokens)
    if longest > max_tokens:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens; this server takes at most {max_tokens}: shorten it",
            param_names["prompt_ids"],
            "context_length_exceeded",
        )
    if body.stream_options is not None and body.stream_options.include_usage and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", "stream_options")
    requests = [
        replace(request, sampling=request.sampling.for_choice(choice))
        for request in prompts
        for choice in range(choices)
    ]
    return RequestBatch(
        requests=tuple(requests),
        choices_per_prompt=choices,
        routing=body.soli.routing,
        param_names=param_names,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        new_parser=new_parser,
    )


def engine_request(
    body: GenerationBody, max_new_tokens: int, constraint: ConstraintSpec | None, loaded: LoadedModel
) -> Request:
    """The request but for its prompt."""
    for name in ("ignore_eos", "min_tokens"):
        if constraint is not None and getattr(body, name):
            raise ApiError(400, f"a constrained answer ends where its format does: leave {name} out", name)
    return Request(
        prompt_ids=(),
        max_new_tokens=max_new_tokens,
        sampling=_sampling(body, loaded.text_model),
        stop_ids=_stop_ids(body, loaded.text_model),
        min_new_tokens=body.min_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        trace=body.soli.routing != "none",
        masked_experts=_masked_experts(body.soli),
        constraint=constraint,
        visible_ids=frozenset() if body.skip_special_tokens else loaded.text_model.tokenizer.special_ids,
    )


def _stop_ids(body: GenerationBody, text_model: TextModel) -> frozenset[int]:
    largest, vocab_size = max(body.stop_token_ids, default=0), text_model.model.config.vocab_size
    if largest >= vocab_size:
        message = f"stop_token_ids names token {largest}, but the model's vocabulary ends at {vocab_size - 1}"
        raise ApiError(400, message, "stop_token_ids")
    return frozenset(body.stop_token_ids) | (frozenset() if body.ignore_eos else text_model.stop_ids)


def _sampling(body: GenerationBody, text_model: TextModel) -> SamplingParams:
    """The body's sampling; where it says nothing, the model folder's, else OpenAI's temperature of 1."""
    vocab_size = text_model.model.config.vocab_size
    logit_bias = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    largest = max(logit_bias, default=0)
    if largest >= vocab_size:
        raise ApiError(
            400,
            f"logit_bias names token {largest}, but the model's vocabulary ends at {vocab_size - 1}",
            "logit_bias",
        )
    values = {name: getattr(body, name) for name in SAMPLING_FIELDS & body.model_fields_set}
    if "top_k" in values:
        values["top_k"] = max(0, body.top_k)
    return sampling_params({**values, "logit_bias": logit_bias}, text_model.sampling_defaults, temperature=1.0)


def _masked_experts(options: SoliOptions) -> frozenset[tuple[int, int]]:
    if {"masked_experts", "mute"} <= options.model_fields_set:
        raise ApiError(400, "give masked_experts or mute, its old name, not both", "soli.mute")
    return frozenset((layer, expert) for layer, expert in [*options.masked_experts, *options.mute])


def param_names(options: SoliOptions, **names: str) -> dict[str, str]:
    """The names that the body gives to fields of a Request: `names`, and what all bodies have."""
    return names | {
        "max_new_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        "masked_experts": "soli.mute" if "mute" in options.model_fields_set else "soli.masked_experts",
    }


def format_constraint(body: GenerationBody) -> ConstraintSpec | None:
    """The constraint of response_format."""
    response_format = body.response_format
    if response_format is None:
        return None
    for field, kind in (("json_schema", "json_schema"), ("pattern", "regex")):
        if (getattr(response_format, field) is None) == (response_format.type == kind):
            problem = "is missing" if response_format.type == kind else f"goes with type {kind} alone"
            raise ApiError(400, f"response_format.{field} {problem}", f"response_format.{field}")
    try:
        if response_format.json_schema is not None:
            return ConstraintSpec.json_schema(response_format.json_schema.schema_)
        if response_format.pattern is not None:
            return ConstraintSpec.regex(response_format.pattern)
        return ConstraintSpec.json_object() if response_format.type == "json_object" else None
    except SoliError as error:
        raise ApiError(400, str(error), "response_format") from error
