"""The JSON bodies of Anthropic's Messages API. Unknown fields are rejected by name, null ones are absent."""

from typing import Annotated, Any, Literal

from pydantic import Field

from soli.serve.protocol_requests import MAX_MESSAGES, MAX_PARTS, Count, MessageBody, RequestBody, StopString


class CachedBlock(MessageBody):
    """What every block may have: a hint about caching, which is automatic here."""

    cache_control: dict[str, Any] | None = None


class TextBlock(CachedBlock):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None  # of documents, which answers here never cite


class ThinkingBlock(MessageBody):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(CachedBlock):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


Texts = str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)]


class ToolResultBlock(CachedBlock):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = ""
    is_error: bool = False


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class AnthropicMessage(MessageBody):
    """One turn; images and documents are rejected. An answer may be sent back whole: what it has besides is unused."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=MAX_PARTS, fail_fast=True)]
    id: str | None = None
    type: Literal["message"] | None = None
    model: str | None = None
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: dict[str, Any] | None = None


class AnthropicTool(CachedBlock):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    input_schema: dict[str, Any] | None = None
    type: Literal["custom"] = "custom"
    strict: bool = False
    eager_input_streaming: bool = True  # arguments are streamed as they are generated
    allowed_callers: list[Literal["direct"]] | None = None


class AnthropicToolChoice(RequestBody):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(RequestBody):
    """`budget_tokens` is a hint; "adaptive" leaves it to the template."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Literal["summarized"] | None = None


class OutputFormat(RequestBody):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(RequestBody):
    effort: str | None = None
    format: OutputFormat | None = None


class AnthropicPrompt(RequestBody):
    """POST /v1/messages/count_tokens: what makes the prompt. `speed` and `cache_control` say what happens anyway."""

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Texts = ""
    tools: Annotated[list[AnthropicTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    speed: Literal["standard"] = "standard"


class AnthropicBody(AnthropicPrompt):
    """POST /v1/messages"""

    max_tokens: Count
    stop_sequences: Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
