"""The JSON bodies that the API answers with, built from the classes that describe them in OpenAPI.

A field that is not set is absent from the JSON (`exclude_unset`); fields are written in the order they have here.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from soli.analysis.residency import Tier
from soli.analysis.trace import TokenTrace
from soli.engine.request import FinishReason

STOP_REASON = "The stop string that ended the text, as in vLLM; absent if none did."


def to_json(response: BaseModel) -> dict[str, Any]:
    """The JSON object of a response."""
    return response.model_dump(exclude_unset=True)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every rejection."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """The body of every rejection of a route of Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class HealthStatus(BaseModel):
    """ "loading", "ready", "stopping", or "failed: …" with the reason."""

    status: str


class ModelCard(BaseModel):
    """A name of the model. `max_model_len`, vLLM's: tokens of a prompt and its answer together; absent while the model
    is being loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class AnthropicModel(BaseModel):
    """A name of the model in Anthropic's shape."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None = None


class AnthropicModelList(BaseModel):
    data: list[AnthropicModel]
    has_more: bool
    first_id: str
    last_id: str


class PromptTokensDetails(BaseModel):
    """Prompt tokens found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Tokens drafted by MTP."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class TokenUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    tokens_per_second: float | None = None  # of all choices together, after their first tokens; not OpenAI's


class ExpertCounts(BaseModel):
    """How often each expert of one layer was selected."""

    layer: str
    counts: list[int]


class RoutingSummary(BaseModel):
    """With routing "summary": the counts of each answer's layers."""

    experts: list[list[ExpertCounts]]


class ChoiceRouting(BaseModel):
    """With routing "full": every layer's decision about every token read."""

    tokens: list[TokenTrace]


class ChunkRouting(BaseModel):
    """With routing "full": the same for the tokens that one choice has read since its last chunk."""

    choice: int
    tokens: list[TokenTrace]


class GenerationBase(BaseModel):
    """What every whole answer and every chunk of a stream has."""

    id: str
    created: int
    model: str
    object: str
    choices: list[Any]


class GenerationResponse(GenerationBase):
    """What every whole answer has."""

    usage: TokenUsage
    soli: RoutingSummary | None = None


class GenerationChunk(GenerationBase):
    """What every chunk of a stream has; usage and summary are in the last one."""

    usage: TokenUsage | None = None
    soli: ChunkRouting | RoutingSummary | None = None


class CompletionLogprobs(BaseModel):
    """An entry per token. With `echo` the first has no log-probability, as nothing is before it, and a token that ends
    the text is listed too."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChunkChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | None = Field(None, description=STOP_REASON)


class CompletionChoice(CompletionChunkChoice):
    finish_reason: Literal["stop", "length"]
    soli: ChoiceRouting | None = None


class CompletionResponse(GenerationResponse):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class CompletionChunk(GenerationChunk):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


class TranslationResponse(GenerationResponse):
    object: Literal["soli.translation"]
    choices: list[CompletionChoice]


class TranslationChunk(GenerationChunk):
    object: Literal["soli.translation"]
    choices: list[CompletionChunkChoice]


class ChatTokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class SampledTokenLogprob(ChatTokenLogprob):
    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[SampledTokenLogprob]


class CalledFunction(BaseModel):
    """`arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | None = Field(None, description=STOP_REASON)
    soli: ChoiceRouting | None = None


class ChatResponse(GenerationResponse):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CalledFunctionDelta(BaseModel):
    name: str | None = None
    arguments: str = ""


class ToolCallDelta(BaseModel):
    """The first delta of a call has its id, type and name; the arguments of all of them make its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDelta


class ChatDelta(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCallDelta] = []


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None
    stop_reason: str | None = Field(None, description=STOP_REASON)


class ChatChunk(GenerationChunk):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


ModelMode = Literal["chat", "translate", "complete"]


class PagedModel(BaseModel):
    """A model that reads routed experts from disk as they are needed. `capacity`: how many fit in memory,
    those of MTP modules among them."""

    capacity: int


class ModelDescription(BaseModel):
    """GET /soli/model. `experts`: per MoE layer; `chosen`: of them per token; `total`, `activated`: parameters.
    `paged`: absent where all experts are in memory for good."""

    name: str
    layers: list[str]
    experts: int
    chosen: int
    groups: int
    kept_groups: int
    total: int
    activated: int
    modes: list[ModelMode]
    context: int
    paged: PagedModel | None = None


class LayerTiers(BaseModel):
    """The experts of one layer that are in memory and those that are being read; the others are on disk."""

    layer: str
    memory: list[int]
    reading: list[int]


class ExpertTiers(BaseModel):
    """GET /soli/experts: where the experts are now."""

    layers: list[LayerTiers]


class ExpertReport(BaseModel):
    """GET /soli/experts/{layer}/{expert}. Of `tokens_read`, the expert was selected for `selected`; `kinds` says what
    sorts of token these were. It has no text of any request: other callers could read it. `tier`: where it is now;
    absent where all experts are in memory for good."""

    layer: str
    expert: int
    selected: int
    tokens_read: int
    plays: int = Field(description="The old name of selected.", json_schema_extra={"deprecated": True})
    read: int = Field(description="The old name of tokens_read.", json_schema_extra={"deprecated": True})
    tokens: list[str] = Field(description="Always empty.", json_schema_extra={"deprecated": True})
    kinds: dict[str, int]
    tier: Tier | None = None
