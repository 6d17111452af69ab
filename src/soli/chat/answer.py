"""A chat as Python uses it: messages to a prompt, and an answer to reasoning, content and tool calls, and the message
that continues the chat."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soli.analysis.notebook_views import html_text
from soli.chat.parser import MessageParser, OutputParser, PlainParser
from soli.chat.templates import ChatTemplate
from soli.engine.constraint import ConstraintSpec
from soli.engine.request import Answer
from soli.errors import SoliError
from soli.sections import shown

Message = Mapping[str, Any]
Messages = Sequence[Message]


@dataclass(frozen=True)
class ChatPrompt:
    """`visible_ids`: special tokens that the parser of the answer reads; `constraint`: of strict tools."""

    token_ids: list[int]
    visible_ids: frozenset[int]
    new_parser: Callable[[], OutputParser]
    constraint: ConstraintSpec | None


def render_chat(
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    is_constrained: bool = False,
) -> ChatPrompt:
    """The prompt up to where the assistant's message starts. `is_constrained`: the answer is all content."""
    if variables is not None and not isinstance(variables, Mapping):
        raise SoliError(f"chat_template_kwargs is {shown(variables)}; give a dictionary of the template's variables")
    schemas = {} if tools is None else dict(map(_tool_schema, tools))
    prompt = template.render(messages, tools or None, variables, allow_reasoning=not is_constrained)

    def new_parser() -> OutputParser:
        if is_constrained:
            return PlainParser()
        calls = template.family.new_format(schemas) if schemas else None
        return MessageParser(calls, prompt.starts_in_reasoning)

    strict = [tool["function"]["name"] for tool in tools or () if tool["function"].get("strict")]
    constraint = template.call_constraint(schemas, strict) if strict else None
    return ChatPrompt(prompt.token_ids, template.parsed_ids(bool(schemas)), new_parser, constraint)


def _tool_schema(tool: Any) -> tuple[str, Mapping[str, Any]]:
    """A tool's name, and the schema of its arguments."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        form = '{"type": "function", "function": {"name": NAME, "parameters": SCHEMA}}'
        raise SoliError(f"a tool is {shown(tool)}: give {form}")
    return function["name"], function.get("parameters") or {"type": "object"}


@dataclass(frozen=True)
class ChatToolCall:
    """A call of the tool `name`; `arguments` is JSON as the model wrote it, valid or not."""

    name: str
    arguments: str
    call_id: str


@dataclass(frozen=True, repr=False)
class ChatAnswer:
    """`content`: what the assistant says; `reasoning`: what it wrote before, between `<think>` and `</think>`;
    `tool_calls`: what it calls, their `arguments` JSON as the model wrote it. `answer`: the tokens, log-probabilities
    and routing of all of it."""

    content: str
    reasoning: str
    tool_calls: tuple[ChatToolCall, ...]
    answer: Answer

    @property
    def text(self) -> str:
        return self.content

    @property
    def finish_reason(self) -> str:
        """As in OpenAI's API: "tool_calls" where there are any, else that of the answer."""
        return "tool_calls" if self.tool_calls and self.answer.finish_reason == "stop" else self.answer.finish_reason

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, to be appended to the messages of the next call."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        else:
            message["content"] = self.content
        return message

    def __repr__(self) -> str:
        reasoning = f", after reasoning {shown(self.reasoning)}" if self.reasoning else ""
        calls = "".join(f", calls {call.name}({shown(call.arguments)})" for call in self.tool_calls)
        return f"<ChatAnswer {shown(self.content)}{calls}{reasoning}, {self.answer.summary}>"

    def _repr_html_(self) -> str:
        reasoning = f'<div style="opacity:0.6">{html_text(self.reasoning)}</div>' if self.reasoning else ""
        calls = "".join(html_text(f"{call.name}({call.arguments})") for call in self.tool_calls)
        return reasoning + html_text(self.content) + calls + html_text(self.answer.summary) + self.answer.routing_map()


def parse_answer(answer: Answer, parser: OutputParser) -> ChatAnswer:
    """The parts of a whole answer. Calls that the model's family gives no ID get one."""
    delta = parser.push(answer.text, last=True)
    calls = [ChatToolCall(one.name or "", one.arguments, one.call_id or _new_call_id()) for one in delta.tool_calls]
    return ChatAnswer(delta.content, delta.reasoning, tuple(calls), answer)


def conversations(messages: Any) -> list[list[Message]]:
    """One conversation or several, each a list of messages: dictionaries, or objects of OpenAI's client. SoliError for
    what is none."""
    if not isinstance(messages, list | tuple) or not messages:
        raise SoliError(f'messages is {shown(messages)}: give a list of messages, {{"role": "user", "content": TEXT}}')
    if all(isinstance(one, list | tuple) for one in messages):
        return [conversation for one in messages for conversation in conversations([_message(each) for each in one])]
    return [[_message(message) for message in messages]]


def _message(message: Any) -> Message:
    if isinstance(message, ChatAnswer):
        message = message.message
    elif hasattr(message, "model_dump"):
        message = message.model_dump()
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise SoliError(f'a message is {shown(message)}: give {{"role": "user", "content": TEXT}}')
    fields = {name: _without_nulls(value) for name, value in message.items() if value not in (None, "", [])}
    return fields | {"content": message.get("content")}  # null beside tool calls stays null


def _without_nulls(value: Any) -> Any:
    """As clients store it, a field that is null is one that is absent."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list | tuple) else value


def _new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
