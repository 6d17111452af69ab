"""The routes of Anthropic's Messages API."""

import secrets
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from soli.serve import protocol_responses as protocol
from soli.serve.answering import EventStream, error_responses, make_batch, named_lines, start, whole_response
from soli.serve.messages_api.answers import AnthropicAnswer, MessageBuilder, TokenCount, error_event
from soli.serve.messages_api.prompts import message_batch, prompt_batch
from soli.serve.messages_api.requests import AnthropicBody, AnthropicPrompt
from soli.serve.middleware import StrictRoute
from soli.serve.responses import CHAT
from soli.serve.service import Service

ERRORS = error_responses(protocol.AnthropicErrorResponse)
ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": AnthropicAnswer, "content": {"text/event-stream": {}}}}


def anthropic_router(service: Service) -> APIRouter:
    """Messages, and the length of their prompts."""
    routes = APIRouter(prefix="/v1/messages", responses=ERRORS, route_class=StrictRoute)

    @routes.post("", response_model=None, responses=ANSWER)
    async def messages(body: AnthropicBody, request: Request) -> Response:
        service.check_model(body.model)
        batch = await make_batch(service, body, message_batch)
        chat, events = await start(service, batch, CHAT)
        prompt_tokens = len(batch.requests[0].prompt_ids)
        builder = MessageBuilder(f"msg_{secrets.token_hex(12)}", service.name, prompt_tokens)
        if body.stream:
            return EventStream(named_lines(builder.events(chat.chunks(events)), error_event), service)
        return await whole_response(builder.whole(chat.chunks(events)), request)

    @routes.post("/count_tokens")
    async def count_tokens(body: AnthropicPrompt) -> TokenCount:
        service.check_model(body.model)
        batch = await make_batch(service, body, prompt_batch)
        return TokenCount(input_tokens=len(batch.requests[0].prompt_ids))

    return routes
