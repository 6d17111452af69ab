"""Tokens of a text or of a conversation as the other routes read them, and the text of tokens, in vLLM's shapes."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from soli.data.tokenizer import TextTooLong
from soli.serve import protocol_responses as protocol
from soli.serve.chat_prompts import chat_batch
from soli.serve.errors import ApiError
from soli.serve.middleware import StrictRoute
from soli.serve.prompts import byte_count, text_tokens
from soli.serve.protocol_requests import (
    MAX_DOCUMENTS,
    MAX_MESSAGES,
    MAX_PROMPT_TOKENS,
    ChatBody,
    Message,
    RequestBody,
    Tool,
)
from soli.serve.responses import token_name
from soli.serve.service import LoadedModel, Service, ServiceLimits

MOST_TOKENS = 2**16  # of one request, or the model's positions: lists of more hold the interpreter's lock for too long

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorResponse} for status in (400, 401, 404, 408, 413, 421, 500, 503)
}


class TokenizeBody(RequestBody):
    """POST /tokenize: a `prompt`, as /v1/completions has it, or `messages` with what else renders a chat.
    `add_special_tokens` false: without the tokens that the tokenizer's files put around a text."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    parse_special: bool = False
    return_token_strs: bool = False
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class DetokenizeBody(RequestBody):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[
        list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)
    ]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    """Special tokens are part of the text."""

    prompt: str


def tokenizer_router(service: Service) -> APIRouter:
    """Tokens of texts, and texts of tokens."""
    routes = APIRouter(responses=ERRORS, route_class=StrictRoute)

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> TokenizeResponse:
        service.check_model(body.model)
        return await asyncio.to_thread(_tokenize, body, service.loaded, service.limits)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> DetokenizeResponse:
        service.check_model(body.model)
        return await asyncio.to_thread(_detokenize, body, service.loaded, service.limits)

    return routes


def _tokenize(body: TokenizeBody, loaded: LoadedModel, limits: ServiceLimits) -> TokenizeResponse:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give a prompt or messages, and not both", "prompt")
    ids = _chat_ids(body, loaded, limits) if body.prompt is None else _text_ids(body, body.prompt, loaded, limits)
    names = [token_name(loaded.text_model, token) for token in ids] if body.return_token_strs else None
    return TokenizeResponse(count=len(ids), max_model_len=loaded.text_model.positions, tokens=ids, token_strs=names)


def _most_tokens(loaded: LoadedModel, limits: ServiceLimits) -> int:
    return min(limits.prompt_tokens, max(MOST_TOKENS, loaded.text_model.positions))


def _text_ids(body: TokenizeBody, text: str, loaded: LoadedModel, limits: ServiceLimits) -> list[int]:
    most = _most_tokens(loaded, limits)
    try:
        loaded.text_model.tokenizer.check_length("the prompt", byte_count(text), most)
        ids = _encode(body, text, loaded)
        if len(ids) > most:
            raise TextTooLong("the prompt", len(ids), most)
    except TextTooLong as error:
        raise ApiError(400, str(error), "prompt", "context_length_exceeded") from error
    return ids


def _encode(body: TokenizeBody, text: str, loaded: LoadedModel) -> list[int]:
    text_model = loaded.text_model
    if not text:  # text_tokens rejects a prompt without any token
        return [*text_model.text_prefix, *text_model.text_suffix] if body.add_special_tokens else []
    return text_tokens(text_model, [text], body.add_special_tokens, body.parse_special)[0]


def _chat_ids(body: TokenizeBody, loaded: LoadedModel, limits: ServiceLimits) -> list[int]:
    """The prompt of a chat, exactly as /v1/chat/completions renders it."""
    fields = {name: getattr(body, name) for name in ChatBody.model_fields if name in TokenizeBody.model_fields}
    chat = ChatBody.model_construct(**fields | {"chat_template_kwargs": body.chat_template_kwargs or {}})
    return list(chat_batch(chat, loaded, limits).requests[0].prompt_ids)


def _detokenize(body: DetokenizeBody, loaded: LoadedModel, limits: ServiceLimits) -> DetokenizeResponse:
    if len(body.tokens) > (most := _most_tokens(loaded, limits)):
        raise ApiError(400, f"tokens has {len(body.tokens):,} items; at most {most:,} are possible here", "tokens")
    tokenizer, vocab_size = loaded.text_model.tokenizer, loaded.text_model.model.config.vocab_size
    largest = max(body.tokens, default=0)
    if largest >= vocab_size:
        raise ApiError(400, f"tokens has {largest}, but the model's vocabulary ends at {vocab_size - 1}", "tokens")
    return DetokenizeResponse(prompt=tokenizer.decode(body.tokens, tokenizer.special_ids))
