"""The JSON bodies that the API accepts, in OpenAI's names.

A field that is not here is rejected by name, never ignored. Null asks for nothing: a field that is null is absent,
known or not. Fields that only inform or hint are accepted and unused. Numbers must be numbers and strings strings
(nothing is converted), and NaN is no number. Lists are bounded and end at their first invalid item, so that validating
a body, which nothing can interrupt, takes milliseconds.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    Tag,
    model_validator,
)

from soli.serve.request_body import Hints, Off, OtherOptions, RequestBody, describe_any
from soli.serve.stored_messages import joined_deltas, meaningful_fields, with_reasoning, without_nulls

MAX_MESSAGES = 4096
MAX_PROMPTS = 1024  # of one body; what the server is started with may allow fewer
MAX_PARTS = 1024  # of a message: texts, calls
MAX_DOCUMENTS = 1024
MAX_PROMPT_TOKENS = 2**20
MAX_BIASES = 2**14

Count = Annotated[int, Field(ge=1, le=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=512)]
StopStrings = StopString | Annotated[list[StopString], Field(max_length=16)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)
]
PromptList = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
LayerAndExpert = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=2, max_length=2)]
LayersAndExperts = Annotated[list[LayerAndExpert], Field(max_length=4096)]


def _check_no_functions(functions: Any) -> Any:
    if functions:
        raise ValueError("is the old name of tools and not supported: give tools")
    return functions


def _check_bias_count(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"has {len(biases):,} entries: at most {MAX_BIASES:,} are possible")
    return biases


TokenKey = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")]  # one way to write each
LogitBias = Annotated[dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_check_bias_count)]


class SoliOptions(RequestBody):
    """`routing`: what to report about it. `masked_experts`: [layer, expert] pairs that must not be selected."""

    routing: Literal["none", "summary", "full"] = "none"
    masked_experts: LayersAndExperts = []
    mute: Annotated[
        LayersAndExperts, Field(description="The old name of masked_experts.", json_schema_extra={"deprecated": True})
    ] = []


class StreamOptions(RequestBody):
    """`include_obfuscation` pads chunks with random text, and `continuous_usage_stats` (vLLM's) has usage in each."""

    include_usage: bool = False
    include_obfuscation: Off = False
    continuous_usage_stats: Off = False


class JsonSchema(RequestBody):
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(RequestBody):
    """What the answer must be. "regex" is not OpenAI's: a text that matches `pattern` from end to end."""

    type: Literal["text", "json_object", "json_schema", "regex"] = "text"
    json_schema: JsonSchema | None = None
    pattern: Annotated[str, Field(min_length=1)] | None = None


class GenerationBody(Hints, OtherOptions):
    """How tokens are sampled and where the answer ends; shared by completions and chat completions."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | Literal[-1] = 0  # -1 as in vLLM: the whole vocabulary, as 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: StopStrings | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=1024)] = []  # vLLM's name
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] = 0  # vLLM's name: as many before the answer may end
    skip_special_tokens: bool = True  # vLLM's name: False leaves them in the text
    ignore_eos: bool = False  # vLLM's and llama.cpp's name: the answer continues to max_tokens
    response_format: ResponseFormat | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    soli: SoliOptions = SoliOptions()


def _prompt_form(prompt: Any) -> str | None:
    """The form that a prompt is meant to have, so that an error is about that form."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else None
    return "texts" if isinstance(first, str) else "lists of ids" if isinstance(first, list) else "ids"


Prompts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[str], PromptList, Tag("texts")]
    | Annotated[list[TokenIds], PromptList, Tag("lists of ids")],
    Discriminator(
        _prompt_form,
        custom_error_type="prompt_form",
        custom_error_message="Input should be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]


class CompletionBody(GenerationBody):
    """POST /v1/completions. `logprobs` false is null; `max_tokens` 0 computes the prompt alone."""

    prompt: Prompts
    add_special_tokens: bool = True  # vLLM's name: those that the tokenizer's files put around a text
    parse_special: bool = False  # llama.cpp's name: names of special tokens in a text are these tokens
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | Off | None = None
    echo: bool = False
    best_of: Count | None = None
    suffix: str = ""


class MessageBody(RequestBody):
    """An object of a message. Unknown fields that are null or empty, or repeat others, are left out."""

    model_config = ConfigDict(json_schema_extra=describe_any)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:
        return meaningful_fields(fields, cls.model_fields) if isinstance(fields, dict) else fields


class FunctionCall(MessageBody):
    """`arguments` is JSON; an object, as templates and some clients have it, is written as such."""

    name: str
    arguments: str = "{}"

    @model_validator(mode="before")
    @classmethod
    def _write_arguments(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("arguments"), dict):
            return fields | {"arguments": json.dumps(fields["arguments"], ensure_ascii=False)}
        if isinstance(fields, dict) and fields.get("arguments") == "":
            return fields | {"arguments": "{}"}
        return fields


class MessageToolCall(MessageBody):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(MessageBody):
    type: Literal["text"]
    text: str


class Message(MessageBody):
    """One turn. `content` may be a list of text parts; images and audio are rejected. `prefix`, DeepSeek's name: the
    answer continues this message, the last one."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    prefix: bool = False

    @model_validator(mode="before")
    @classmethod
    def _read_other_forms(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        fields = with_reasoning(fields)
        if isinstance(fields.get("tool_calls"), list):
            fields["tool_calls"] = joined_deltas(fields["tool_calls"])
        return fields

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def for_template(self) -> dict[str, Any]:
        """The message as templates read it; content null beside tool calls stays null."""
        fields = self.model_dump(exclude_none=True)
        filled = {name: value for name, value in fields.items() if value not in ("", [], False)}
        return filled | {"content": fields.get("content")}


class Function(RequestBody):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool | None = None


class Tool(RequestBody):
    type: Literal["function"]
    function: Function
    _source: dict[str, Any] = PrivateAttr({})

    @model_validator(mode="wrap")
    @classmethod
    def _keep_source(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        tool = validate(value)
        tool._source = value if isinstance(value, dict) else tool.model_dump(exclude_unset=True)
        return tool

    @property
    def for_template(self) -> dict[str, Any]:
        """The tool as it was sent, its fields in their order, but for those that are null."""
        return {name: value for name, value in without_nulls(self._source).items() if name in type(self).model_fields}


class FunctionName(RequestBody):
    name: str


class ToolChoice(RequestBody):
    type: Literal["function"]
    function: FunctionName


class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: str | None = None  # for templates that have a use for it
    verbosity: str | None = None  # a hint; unused
    modalities: list[Literal["text"]] = []
    functions: Annotated[list[Any], Field(max_length=0), BeforeValidator(_check_no_functions)] = []
    function_call: Literal["none", "auto"] = "none"  # the old name of tool_choice
    chat_template: str | None = None  # the name of one of the folder's templates
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: Off = False  # a template has all of them
    echo: Off = False


class TranslateBody(RequestBody):
    """POST /soli/translate: one text between English and Chinese, for models trained for it as the bundled one is."""

    text: Annotated[str, Field(min_length=1)]
    to: Literal["en", "zh"] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Seed | None = None
    stream: bool = False
    soli: SoliOptions = SoliOptions()
