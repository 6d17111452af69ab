"""What the server answers, for its OpenAPI description; nothing is made or checked with these while it runs."""

from typing import Any, Literal

from pydantic import BaseModel

from soli.serve.protocol import ToolCall


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What every refusal looks like."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens. Of the prompt, those found in the cache; of the answer, those that MTP drafted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class Head(BaseModel):
    """`soli`: with routing "summary" the counts per layer and expert of each answer."""

    id: str
    created: int
    model: str
    usage: Usage
    soli: dict[str, Any] = {}


class ChoiceHead(BaseModel):
    """`soli`: with routing "full" the tokens read and what every layer decided about them."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    soli: dict[str, Any] = {}


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(ChoiceHead):
    text: str
    logprobs: CompletionLogprobs | None


class CompletionAnswer(Head):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TranslationAnswer(Head):
    object: Literal["soli.translation"]
    choices: list[CompletionChoice]


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class DrawnLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[DrawnLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(ChoiceHead):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatAnswer(Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


def answers(model: type[Head]) -> dict[int | str, dict[str, Any]]:
    """The description of a route that answers with `model`, or with a stream of its pieces."""
    return {200: {"model": model, "content": {"text/event-stream": {}}}}
