"""From a body of the Messages API to a chat's: one conversion, then everything is a chat's."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from soli.serve.chat_conversion import converted_batch
from soli.serve.errors import ApiError
from soli.serve.messages_api.requests import (
    AnthropicBody,
    AnthropicMessage,
    AnthropicPrompt,
    AnthropicTool,
    OutputConfig,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from soli.serve.prompts import RequestBatch
from soli.serve.service import LoadedModel, ServiceLimits

# Fields of a chat, by those of the body that ask for them.
FIELDS = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "chat_template_kwargs": "thinking",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def message_batch(body: AnthropicBody, loaded: LoadedModel, limits: ServiceLimits) -> RequestBatch:
    """POST /v1/messages."""
    sampling = body.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True)
    limit = {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences or []}
    return converted_batch(chat_fields(body) | sampling | limit, FIELDS, loaded, limits)


def prompt_batch(body: AnthropicPrompt, loaded: LoadedModel, limits: ServiceLimits) -> RequestBatch:
    """POST /v1/messages/count_tokens."""
    return converted_batch(chat_fields(body), FIELDS, loaded, limits)


def chat_fields(body: AnthropicPrompt) -> dict[str, Any]:
    """The fields of a chat that say the same as those of the prompt."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": chat_content(body.system)})
    for number, message in enumerate(body.messages):
        for converted in chat_messages(message, f"messages.{number}"):
            append_turn(messages, converted)
    if messages[-1]["role"] == "assistant" and messages[-1]["content"] and "tool_calls" not in messages[-1]:
        messages[-1]["prefix"] = True  # the answer continues it
    fields: dict[str, Any] = {"messages": messages, "tools": [_tool(tool) for tool in body.tools or ()]}
    if body.tool_choice is not None:
        fields |= _tool_choice(body)
    if body.thinking is not None and body.thinking.type != "adaptive":
        is_enabled = body.thinking.type == "enabled"
        fields["chat_template_kwargs"] = {"thinking": is_enabled, "enable_thinking": is_enabled}
    output = body.output_config or OutputConfig()
    if output.effort is not None:
        fields["reasoning_effort"] = output.effort
    if output.format is not None:
        schema = {"name": "output", "schema": output.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def chat_content(texts: str | Sequence[TextBlock]) -> str | list[dict[str, str]]:
    """A chat's content of the same texts."""
    return texts if isinstance(texts, str) else [{"type": "text", "text": block.text} for block in texts]


def append_turn(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Appends a message; texts of the user after others of the user are one turn, as in Anthropic's API."""
    if messages and message["role"] == messages[-1]["role"] == "user":
        messages[-1]["content"] = _parts(messages[-1]["content"]) + _parts(message["content"])
    else:
        messages.append(message)


def chat_messages(message: AnthropicMessage, param: str) -> Iterator[dict[str, Any]]:
    """The messages of a chat for one message: tool results are messages of their own."""
    if isinstance(message.content, str) or not message.content:
        yield {"role": message.role, "content": message.content or ""}
        return
    if message.role == "assistant":
        yield _assistant_message(message.content, param)
        return
    texts: list[TextBlock] = []
    for number, block in enumerate(message.content):
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ToolResultBlock) and message.role == "user":
            if texts:
                yield {"role": message.role, "content": chat_content(texts)}
                texts = []
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)}
        else:
            raise _misplaced(block, message.role, f"{param}.content.{number}")
    if texts:
        yield {"role": message.role, "content": chat_content(texts)}


def _assistant_message(blocks: Sequence[Any], param: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for number, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            raise _misplaced(block, "assistant", f"{param}.content.{number}")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or (None if calls else "")}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _misplaced(block: Any, role: str, param: str) -> ApiError:
    return ApiError(400, f"a message of the role {role} has no {block.type} blocks", param)


def _result(block: ToolResultBlock) -> str | list[dict[str, str]]:
    """What a tool returned; an error says so, since chats have no field for it."""
    content = chat_content(block.content)
    if not block.is_error:
        return content
    return f"Error: {content}" if isinstance(content, str) else [{"type": "text", "text": "Error: "}, *content]


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.input_schema:
        function["parameters"] = tool.input_schema
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _tool_choice(body: AnthropicPrompt) -> dict[str, Any]:
    choice = body.tool_choice
    assert choice is not None
    if (choice.type == "tool") != (choice.name is not None):
        problem = "is missing" if choice.type == "tool" else "goes with type tool alone"
        raise ApiError(400, f"tool_choice.name {problem}", "tool_choice.name")
    fields: dict[str, Any] = {"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {}
    if choice.type == "tool":
        return fields | {"tool_choice": {"type": "function", "function": {"name": choice.name}}}
    return fields | {"tool_choice": CHOICES[choice.type]}
