"""OpenAI's routes: models, completions, chat completions."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from soli.serve.middleware import StrictRoute
from soli.serve.prompts import RequestBatch, chat_batch, completion_batch
from soli.serve.protocol_requests import ChatBody, CompletionBody
from soli.serve.protocol_responses import ErrorResponse, ModelCard, ModelList, to_json
from soli.serve.responses import CHAT, COMPLETION, AnswerFormat, ResponseBuilder
from soli.serve.service import Service
from soli.serve.streaming import EventStream, while_connected

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 408, 413, 421, 429, 500, 503, 504)
}

UNREAD_SECONDS = 30.0  # how much longer than the answer its reader may take


def router(service: Service) -> APIRouter:
    """The routes under /v1."""
    routes = APIRouter(prefix="/v1", responses=ERRORS, route_class=StrictRoute)

    @routes.get("/models")
    def models() -> ModelList:
        return ModelList(object="list", data=[_card(service)])

    @routes.get("/models/{name:path}")
    def model(name: str) -> ModelCard:
        service.check_model(name)
        return _card(service)

    @routes.post("/completions", response_model=None, responses=described(COMPLETION))
    async def completions(body: CompletionBody, request: Request) -> Response:
        service.check_model(body.model)
        batch = await asyncio.to_thread(completion_batch, body, service.loaded, service.limits)
        return await respond(service, request, batch, COMPLETION, body.stream)

    @routes.post("/chat/completions", response_model=None, responses=described(CHAT))
    async def chat(body: ChatBody, request: Request) -> Response:
        service.check_model(body.model)
        batch = await asyncio.to_thread(chat_batch, body, service.loaded, service.limits)
        return await respond(service, request, batch, CHAT, body.stream)

    return routes


def described(answer_format: AnswerFormat) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of a route that answers with a whole response, or with a stream of its pieces."""
    return {200: {"model": answer_format.response, "content": {"text/event-stream": {}}}}


async def respond(
    service: Service, request: Request, batch: RequestBatch, answer_format: AnswerFormat, stream: bool | None
) -> Response:
    """A stream or a whole response. Rejections come before the first byte of either."""
    builder = ResponseBuilder(service, batch, answer_format)
    if stream:
        return EventStream(await builder.stream(), service.limits.seconds + UNREAD_SECONDS)
    return JSONResponse(to_json(await while_connected(request, builder.whole())))


def _card(service: Service) -> ModelCard:
    return ModelCard(id=service.name, object="model", created=service.created, owned_by="soli")
