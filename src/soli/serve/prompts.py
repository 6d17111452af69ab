"""From a body to the engine's requests: prompts as tokens, how to sample, where to stop. What the model cannot do is
refused with the field that asks for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from soli.chat.templates import JsonText
from soli.chat.tool_calls import schema_of_any
from soli.engine.constraint import ConstraintSpec
from soli.engine.request import Request
from soli.engine.sampler import SamplingParams
from soli.errors import SoliError
from soli.serve.errors import ApiError
from soli.serve.protocol import ChatBody, CompletionBody, Message, Sampling, SoliOptions, Tool, ToolCall, ToolChoice
from soli.serve.service import Loaded, ServiceLimits

COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat may use the room there is
PARAMS = {"max_new_tokens": "max_tokens", "masked_experts": "soli.mute"}  # fields of a Request as bodies call them


@dataclass(frozen=True)
class Asked:
    """What a body asks for: `choices` answers to each of `prompts`, all as `requests`, prompt by prompt."""

    requests: tuple[Request, ...]
    choices: int
    options: SoliOptions
    params: Mapping[str, str]  # the body's names of the requests' fields, for refusals
    usage_chunk: bool = False
    thinking: bool = False  # the prompt ends inside the reasoning
    tools: bool = False  # the answer may hold calls
    forced_tool: str | None = None  # the answer is the arguments of this tool, or of "" one that it names


def completion(body: CompletionBody, loaded: Loaded, limits: ServiceLimits) -> Asked:
    """POST /v1/completions."""
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    prompts = [loaded.text_model.text_prompt(one) if isinstance(one, str) else list(one) for one in given]
    base = _base(body, body.max_tokens or COMPLETION_TOKENS, _format(body), loaded)
    requests = [replace(base, prompt_ids=tuple(ids), logprobs=body.logprobs) for ids in prompts]
    return _asked(body, requests, {"prompt_ids": "prompt", **PARAMS, "constraint": "response_format"}, loaded, limits)


def chat(body: ChatBody, loaded: Loaded, limits: ServiceLimits) -> Asked:
    """POST /v1/chat/completions."""
    if loaded.template is None:
        raise ApiError(
            400,
            "this model has no chat template, so it cannot chat: use /v1/completions, or /soli/translate where the "
            "model translates",
            "messages",
        )
    tools, forced = _tools(body, loaded)
    constraint = _constraint(body, forced)
    try:
        turns = [_turn(one) for one in body.messages]
        ids, thinking = loaded.template.render(turns, tools, body.chat_template_kwargs, think=constraint is None)
    except SoliError as error:
        raise ApiError(400, str(error), "messages") from error
    if body.max_tokens and body.max_completion_tokens:
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    room = max(1, loaded.text_model.positions - len(ids))
    base = _base(body, body.max_completion_tokens or body.max_tokens or room, constraint, loaded)
    request = replace(
        base,
        prompt_ids=tuple(ids),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    params = {"prompt_ids": "messages", **PARAMS, "constraint": "response_format" if forced is None else "tools"}
    if body.max_completion_tokens:
        params["max_new_tokens"] = "max_completion_tokens"
    asked = _asked(body, [request], params, loaded, limits)
    return replace(asked, thinking=thinking, tools=bool(tools) and forced is None, forced_tool=forced)


def _asked(
    body: Sampling, prompts: Sequence[Request], params: Mapping[str, str], loaded: Loaded, limits: ServiceLimits
) -> Asked:
    choices = body.n or 1
    if choices * len(prompts) > limits.choices:
        raise ApiError(400, f"{choices * len(prompts)} answers are asked for; this server gives {limits.choices}", "n")
    longest = max(len(one.prompt_ids) for one in prompts)
    most = min(limits.prompt_tokens, loaded.text_model.positions - 1)
    if longest > most:
        said = f"the prompt has {longest} tokens; this server takes at most {most}: shorten it"
        raise ApiError(400, said, params["prompt_ids"], "context_length_exceeded")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", "stream_options")
    requests = [replace(one, sampling=one.sampling.numbered(at)) for one in prompts for at in range(choices)]
    usage = body.stream_options is not None and body.stream_options.include_usage
    return Asked(tuple(requests), choices, body.soli, params, usage)


def _base(body: Sampling, max_new_tokens: int, constraint: ConstraintSpec | None, loaded: Loaded) -> Request:
    if constraint is not None and body.ignore_eos:
        raise ApiError(400, "an answer held to a format ends where the format does: leave ignore_eos out", "ignore_eos")
    vocab = loaded.text_model.model.config.vocab_size
    largest = max(map(int, body.logit_bias or {}), default=0)
    if largest >= vocab:
        said = f"logit_bias names token {largest}, but the model's vocabulary ends at {vocab - 1}"
        raise ApiError(400, said, "logit_bias")
    sampling = SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        seed=body.seed,
    )
    return Request(
        prompt_ids=(),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=frozenset() if body.ignore_eos else loaded.text_model.stop_ids,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        trace=body.soli.routing != "none",
        masked_experts=frozenset((layer, expert) for layer, expert in body.soli.mute),
        constraint=constraint,
    )


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates read it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [_called(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            turn[name] = getattr(message, name)
    return turn


def _called(call: ToolCall) -> dict[str, Any]:
    dumped = call.model_dump()
    dumped["function"]["arguments"] = JsonText(call.function.arguments)
    return dumped


def _tools(body: ChatBody, loaded: Loaded) -> tuple[list[dict[str, Any]] | None, str | None]:
    """The tools as the template gets them, and the one that must be called ("": any)."""
    if not body.tools:
        if body.tool_choice not in (None, "none"):
            raise ApiError(400, "tool_choice needs tools", "tool_choice")
        return None, None
    assert loaded.template is not None
    if not loaded.template.knows_tools:
        raise ApiError(400, "this model's chat template knows no tools: leave them out", "tools")
    if body.tool_choice == "none":
        return None, None
    forced = _forced(body, body.tools)
    if forced is None:
        _refuse_what_only_force_can_do(body, body.tools)
    return [tool.model_dump(exclude_none=True) for tool in body.tools], forced


def _forced(body: ChatBody, tools: Sequence[Tool]) -> str | None:
    """The tool that must be called; "": any of them, None: none need be."""
    if not isinstance(body.tool_choice, ToolChoice):
        return "" if body.tool_choice == "required" else None
    name = body.tool_choice.function.name
    if name not in {tool.function.name for tool in tools}:
        raise ApiError(400, f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
    return name


def _refuse_what_only_force_can_do(body: ChatBody, tools: Sequence[Tool]) -> None:
    if body.parallel_tool_calls is False:
        said = "the model decides how many calls it makes: leave parallel_tool_calls out or set tool_choice"
        raise ApiError(400, said, "parallel_tool_calls")
    for number, tool in enumerate(tools):
        if tool.function.strict:
            said = "arguments are held to their schema only where a call is forced: leave strict out or set tool_choice"
            raise ApiError(400, said, f"tools.{number}.function.strict")
    if body.response_format is not None and body.response_format.type != "text":
        said = "an answer held to a format cannot call tools: leave response_format out or set tool_choice to none"
        raise ApiError(400, said, "response_format")


def _constraint(body: ChatBody, forced: str | None) -> ConstraintSpec | None:
    if forced is None:
        return _format(body)
    if body.response_format is not None and body.response_format.type != "text":
        raise ApiError(400, "a forced tool and a response_format exclude each other", "response_format")
    try:
        return ConstraintSpec.json_schema(_forced_schema(body.tools or [], forced))
    except SoliError as error:
        raise ApiError(400, str(error), "tools") from error


def _format(body: Sampling) -> ConstraintSpec | None:
    """What response_format holds the answer to."""
    wanted = body.response_format
    if wanted is None:
        return None
    for field, kind in (("json_schema", "json_schema"), ("pattern", "regex")):
        if (getattr(wanted, field) is None) == (wanted.type == kind):
            said = "is missing" if wanted.type == kind else f"goes with type {kind} alone"
            raise ApiError(400, f"response_format.{field} {said}", f"response_format.{field}")
    try:
        if wanted.json_schema is not None:
            return ConstraintSpec.json_schema(wanted.json_schema.schema_)
        if wanted.pattern is not None:
            return ConstraintSpec.regex(wanted.pattern)
        return ConstraintSpec.json_object() if wanted.type == "json_object" else None
    except SoliError as error:
        raise ApiError(400, str(error), "response_format") from error


def _forced_schema(tools: Sequence[Tool], forced: str) -> dict[str, Any]:
    schemas = [(tool.function.name, tool.function.parameters or {"type": "object"}) for tool in tools]
    return dict(schemas)[forced] if forced else schema_of_any(schemas)
