"""From a body of the Responses API to a chat's: one conversion, then everything is a chat's."""

from collections.abc import Sequence
from typing import Any

from soli.serve.chat_conversion import converted_batch
from soli.serve.errors import ApiError
from soli.serve.prompts import RequestBatch
from soli.serve.responses_api.requests import (
    FunctionCallItem,
    FunctionOutputItem,
    FunctionTool,
    FunctionToolChoice,
    MessageItem,
    ReasoningItem,
    ResponsesBody,
    TextFormat,
    TextItemPart,
)
from soli.serve.service import LoadedModel, ServiceLimits

# Fields of a chat, by those of the body that ask for them.
FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def response_batch(body: ResponsesBody, loaded: LoadedModel, limits: ServiceLimits) -> RequestBatch:
    """POST /v1/responses."""
    return converted_batch(chat_fields(body), FIELDS, loaded, limits)


def chat_fields(body: ResponsesBody) -> dict[str, Any]:
    """The fields of a chat that say the same."""
    fields = body.model_dump(include={"temperature", "top_p", "parallel_tool_calls"}, exclude_none=True)
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    fields["messages"] = messages + input_messages(body.input)
    fields["max_completion_tokens"] = body.max_output_tokens
    fields["tools"] = [_tool(tool) for tool in body.tools or ()]
    fields["tool_choice"] = body.tool_choice
    if isinstance(body.tool_choice, FunctionToolChoice):
        fields["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    if body.reasoning is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    if "message.output_text.logprobs" in (body.include or ()) or body.top_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return fields


def input_messages(items: str | Sequence[Any]) -> list[dict[str, Any]]:
    """The messages of a chat. What a model wrote in one turn, reasoning, text and calls, is one message of its own."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # of the model, to which items are still added
    for item in items:
        part = _model_part(item)
        if part is None:
            messages.append(_other_message(item))
            turn = None
        elif turn is None or _starts_turn(turn, part):
            turn = {"role": "assistant", "content": None} | part
            messages.append(turn)
        else:
            calls = [*turn.get("tool_calls", []), *part.pop("tool_calls", [])]
            turn |= part | ({"tool_calls": calls} if calls else {})
    for message in messages:
        if message["role"] == "assistant" and message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
    return messages


def _model_part(item: Any) -> dict[str, Any] | None:
    """What an item adds to a message of the model; None for an item of another role."""
    if isinstance(item, ReasoningItem):
        return {"reasoning_content": "".join(part.text for part in item.content or item.summary or ())}
    if isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        return {"tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    if isinstance(item, MessageItem) and item.role == "assistant":
        return {"content": _content(item.content)}
    return None


def _starts_turn(turn: dict[str, Any], part: dict[str, Any]) -> bool:
    """Whether a part cannot belong to the turn: a second text, or reasoning or text after calls."""
    if "tool_calls" in part:
        return False
    has_reasoning = "reasoning_content" in part and "reasoning_content" in turn
    return turn["content"] is not None or "tool_calls" in turn or has_reasoning


def _other_message(item: Any) -> dict[str, Any]:
    if isinstance(item, FunctionOutputItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
    return {"role": item.role, "content": _content(item.content)}


def _content(texts: str | Sequence[TextItemPart]) -> str | list[dict[str, str]]:
    return texts if isinstance(texts, str) else [{"type": "text", "text": part.text} for part in texts]


def _tool(tool: FunctionTool) -> dict[str, Any]:
    fields = ("name", "description", "parameters", "strict")
    function = {name: getattr(tool, name) for name in fields if getattr(tool, name) is not None}
    return {"type": "function", "function": function}


def _response_format(text_format: TextFormat) -> dict[str, Any]:
    if (text_format.type == "json_schema") != (text_format.schema_ is not None):
        problem = "is missing" if text_format.schema_ is None else "goes with type json_schema alone"
        raise ApiError(400, f"text.format.schema {problem}", "text.format.schema")
    if text_format.schema_ is None:
        return {"type": text_format.type}
    schema = {"name": text_format.name or "output", "schema": text_format.schema_, "strict": text_format.strict}
    return {"type": "json_schema", "json_schema": schema}
