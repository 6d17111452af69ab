"""The JSON bodies that the API accepts, in OpenAI's names.

A field that is not here is rejected by name, never ignored. Numbers must be numbers and strings strings (nothing is
converted), and NaN is no number.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=512)]
StopStrings = StopString | Annotated[list[StopString], Field(max_length=16)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1)]
LayerAndExpert = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=2, max_length=2)]
LayersAndExperts = Annotated[list[LayerAndExpert], Field(max_length=4096)]


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SoliOptions(RequestBody):
    """`routing`: what to report about it. `masked_experts`: [layer, expert] pairs that must not be selected."""

    routing: Literal["none", "summary", "full"] = "none"
    masked_experts: LayersAndExperts = []
    mute: Annotated[
        LayersAndExperts, Field(description="The old name of masked_experts.", json_schema_extra={"deprecated": True})
    ] = []


class StreamOptions(RequestBody):
    include_usage: bool = False


class JsonSchema(RequestBody):
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(RequestBody):
    """What the answer must be. "regex" is not OpenAI's: a text that matches `pattern` from end to end."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    pattern: Annotated[str, Field(min_length=1)] | None = None


class GenerationBody(RequestBody):
    """How tokens are sampled and where the answer ends; shared by completions and chat completions."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    seed: Seed | None = None
    stop: StopStrings | None = None
    ignore_eos: bool = False  # vLLM's and llama.cpp's name: the answer continues to max_tokens
    response_format: ResponseFormat | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # the caller's own record of who asks; unused
    soli: SoliOptions = SoliOptions()


class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class FunctionCall(RequestBody):
    name: str
    arguments: str


class MessageToolCall(RequestBody):
    id: str
    type: Literal["function"]
    function: FunctionCall


class TextPart(RequestBody):
    type: Literal["text"]
    text: str


class Message(RequestBody):
    """One turn. `content` may be a list of text parts; images and audio are rejected."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(RequestBody):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool | None = None


class Tool(RequestBody):
    type: Literal["function"]
    function: Function


class FunctionName(RequestBody):
    name: str


class ToolChoice(RequestBody):
    type: Literal["function"]
    function: FunctionName


class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] = {}


class TranslateBody(RequestBody):
    """POST /soli/translate: one text between English and Chinese, for models trained for it as the bundled one is."""

    text: Annotated[str, Field(min_length=1)]
    to: Literal["en", "zh"] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Seed | None = None
    stream: bool = False
    soli: SoliOptions = SoliOptions()
