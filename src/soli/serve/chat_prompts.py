"""From a chat's body to the engine's request: messages rendered by the template, tools, how the answer is parsed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from soli.chat.parser import ForcedCallParser, MessageParser, OutputParser, PlainParser, any_call_schema
from soli.chat.templates import ChatTemplate, RejectedMessages, RenderedPrompt, RenderOptions
from soli.data.tokenizer import TextTooLong
from soli.engine.constraint import ConstraintSpec, checked_schema
from soli.errors import SoliError
from soli.serve.errors import ApiError
from soli.serve.prompts import (
    SHRINKS,
    RequestBatch,
    byte_count,
    check_choices,
    engine_request,
    format_constraint,
    longest_prompt,
    param_names,
    request_batch,
)
from soli.serve.protocol_requests import ChatBody, ResponseFormat, Tool, ToolChoice
from soli.serve.service import LoadedModel, ServiceLimits


def chat_batch(body: ChatBody, loaded: LoadedModel, limits: ServiceLimits) -> RequestBatch:
    """POST /v1/chat/completions."""
    check_choices(body, 1, limits)
    template = _chat_template(loaded)
    tools = _Tools(body)
    constraint = _constraint(body, template, tools)
    is_free = constraint is None or (constraint.kind == "grammar" and not _has_format(body.response_format))
    prompt = _render(body, template, tools.for_template, is_free, longest_prompt(loaded, limits))
    _check_chat(body)
    remaining_tokens = max(1, loaded.text_model.positions - len(prompt.token_ids))
    max_tokens = body.max_completion_tokens or body.max_tokens or remaining_tokens
    new_parser = _new_parser(loaded, tools, is_free, prompt.starts_in_reasoning)
    chat_request = engine_request(body, max_tokens, constraint, loaded)
    chat_request = replace(
        chat_request,
        prompt_ids=tuple(prompt.token_ids),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        visible_ids=chat_request.visible_ids | template.parsed_ids(bool(tools.usable)),
    )
    names = param_names(
        body.soli, prompt_ids="messages", constraint="tools" if tools.usable else "response_format"
    )
    if not body.max_tokens:
        names["max_new_tokens"] = "max_completion_tokens" if body.max_completion_tokens else "messages"
    return request_batch(body, [chat_request], names, loaded, limits, new_parser)


def _chat_template(loaded: LoadedModel) -> ChatTemplate:
    if loaded.template is not None:
        return loaded.template
    if loaded.template_error is not None:
        raise ApiError(400, f"this model cannot chat: {loaded.template_error}", "messages")
    raise ApiError(
        400,
        "this model has no chat template, so it cannot chat: use /v1/completions, or /soli/translate if the model "
        "translates",
        "messages",
    )


def _render(
    body: ChatBody,
    template: ChatTemplate,
    tools: list[dict[str, Any]] | None,
    allow_reasoning: bool,
    max_tokens: int,
) -> RenderedPrompt:
    messages = [message.for_template for message in body.messages]
    options = RenderOptions(
        template=body.chat_template,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message or body.messages[-1].prefix,
    )
    try:
        size = sum(byte_count(message.text) for message in body.messages)
        template.check_length(size, max_tokens * SHRINKS)
        return template.render(messages, tools, _template_variables(body), allow_reasoning, max_tokens, **options)
    except TextTooLong as error:
        raise ApiError(400, str(error), "messages", "context_length_exceeded") from error
    except RejectedMessages as error:
        param = "chat_template_kwargs" if error.field == "variables" else error.field
        raise ApiError(400, str(error), param) from error


def _template_variables(body: ChatBody) -> dict[str, Any]:
    """Further variables of the template; one that it does not use has no effect."""
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return effort | body.chat_template_kwargs


def _check_chat(body: ChatBody) -> None:
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both", "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")


class _Tools:
    """The tools of a body. `usable`: those that the answer may call. `forced`: the one that must be called; "": any of
    them, None: none need be."""

    def __init__(self, body: ChatBody) -> None:
        if not body.tools and body.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", "tool_choice")
        self.usable: Sequence[Tool] = () if body.tool_choice == "none" else body.tools or ()
        self.forced = self._forced(body)

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        return [tool.for_template for tool in self.usable] or None

    @property
    def strict(self) -> set[str]:
        """Names of those whose arguments must fit their schemas; ApiError for a schema that cannot be enforced."""
        for number, tool in enumerate(self.usable):
            try:
                if tool.function.strict:
                    checked_schema(tool.function.parameters)
            except SoliError as error:
                raise ApiError(400, str(error), f"tools.{number}.function.parameters") from error
        return {tool.function.name for tool in self.usable if tool.function.strict}

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """The schemas of the arguments by name."""
        return {tool.function.name: tool.function.parameters or {"type": "object"} for tool in self.usable}

    def _forced(self, body: ChatBody) -> str | None:
        if not isinstance(body.tool_choice, ToolChoice):
            return "" if body.tool_choice == "required" else None
        name = body.tool_choice.function.name
        if name not in self.schemas:
            raise ApiError(400, f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
        return name


def _has_format(response_format: ResponseFormat | None) -> bool:
    return response_format is not None and response_format.type != "text"


def _constraint(body: ChatBody, template: ChatTemplate, tools: _Tools) -> ConstraintSpec | None:
    """What the answer must be: of a certain format, one forced call, or calls that fit strict tools."""
    if tools.forced is not None:
        if _has_format(body.response_format):
            raise ApiError(400, "a forced tool and a response_format exclude each other", "response_format")
        try:
            return ConstraintSpec.json_schema(_forced_schema(tools))
        except SoliError as error:
            raise ApiError(400, str(error), "tools") from error
    format_spec = format_constraint(body)
    is_parallel = body.parallel_tool_calls is not False
    if not tools.usable or (is_parallel and format_spec is None and not tools.strict):
        return format_spec
    if format_spec is not None and format_spec.kind != "json_schema":
        raise ApiError(400, "an answer that may call tools can be JSON, not a regular expression", "response_format")
    content = None if format_spec is None else json.loads(format_spec.text)
    return template.call_constraint(tools.schemas, tools.strict, is_parallel, content)


def _forced_schema(tools: _Tools) -> dict[str, Any]:
    return tools.schemas[tools.forced] if tools.forced else any_call_schema(list(tools.schemas.items()))


def _new_parser(
    loaded: LoadedModel, tools: _Tools, is_free: bool, starts_in_reasoning: bool
) -> Callable[[], OutputParser]:
    """`is_free`: the answer may have reasoning and text of any form."""
    if tools.forced is not None:
        return lambda: ForcedCallParser(tools.forced or None)
    if not is_free and not tools.usable:
        return PlainParser
    family = _chat_template(loaded).family
    split_reasoning = loaded.split_reasoning and is_free
    return lambda: MessageParser(
        family.new_format(tools.schemas) if tools.usable else None, starts_in_reasoning, split_reasoning
    )
