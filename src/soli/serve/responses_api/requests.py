"""The JSON body of POST /v1/responses. Unknown fields are rejected by name, null ones are absent."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from soli.serve.protocol_requests import MAX_MESSAGES, MAX_PARTS, Count, Hints, MessageBody, Off, RequestBody

Status = Literal["in_progress", "completed", "incomplete"]


class TextItemPart(MessageBody):
    """A text of the user or of the model; images and files are rejected."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


ItemTexts = str | Annotated[list[TextItemPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class MessageItem(MessageBody):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemTexts
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class ReasoningText(MessageBody):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(MessageBody):
    """`content` is what the model thought; a summary alone is what is left of it elsewhere."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    status: Status | None = None


class FunctionCallItem(MessageBody):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionOutputItem(MessageBody):
    type: Literal["function_call_output"]
    call_id: str
    output: ItemTexts
    id: str | None = None
    status: Status | None = None


def _item_type(item: Any) -> str | None:
    return item.get("type", "message") if isinstance(item, dict) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(
        _item_type,
        custom_error_type="item_type",
        custom_error_message="Input should be an item of type message, reasoning, function_call or "
        "function_call_output: the others are not supported",
    ),
]


class FunctionTool(RequestBody):
    """`strict` is null where it should be true: then arguments are constrained only if the call is forced."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionToolChoice(RequestBody):
    type: Literal["function"]
    name: str


class TextFormat(RequestBody):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(RequestBody):
    """`verbosity` is a hint, unused."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(RequestBody):
    """`effort` is for templates that have a use for it. Reasoning is sent whole, so that no summary is made."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ObfuscationOptions(RequestBody):
    include_obfuscation: Off = False


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


def _reject_reference(value: Any) -> Any:
    raise ValueError("refers to what is stored, and nothing is stored here: send the whole conversation as input")


Reference = Annotated[None, BeforeValidator(_reject_reference)]


class ResponsesBody(Hints):
    """POST /v1/responses. `include` adds to items; of those that there are here only messages have more to add. `store`
    is without effect: nothing is stored."""

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[Includable], Field(max_length=64)] | None = None
    truncation: Literal["disabled"] | None = None
    background: Off = False
    stream: bool = False
    stream_options: ObfuscationOptions | None = None
    previous_response_id: Reference = None
    conversation: Reference = None
    prompt: Reference = None
