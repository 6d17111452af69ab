"""OpenAI's routes: models, completions, chat completions."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from soli.serve import prompts
from soli.serve.answer_schema import ChatAnswer, CompletionAnswer, ErrorAnswer, answers
from soli.serve.answers import Answer
from soli.serve.choices import ChatChoice, Choice, CompletionChoice
from soli.serve.prompts import Asked
from soli.serve.protocol import ChatBody, CompletionBody
from soli.serve.service import Service
from soli.serve.streaming import EventStream, while_connected
from soli.serve.strict import StrictRoute

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 408, 413, 421, 429, 500, 503, 504)
}

UNREAD_SECONDS = 30.0  # how much longer than the answer its reader may take


def router(service: Service) -> APIRouter:
    """The routes under /v1."""
    routes = APIRouter(prefix="/v1", responses=ERRORS, route_class=StrictRoute)

    @routes.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(service)]}

    @routes.get("/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _card(service)

    @routes.post("/completions", response_model=None, responses=answers(CompletionAnswer))
    async def completions(body: CompletionBody, request: Request) -> Response:
        service.check_model(body.model)
        loaded = service.loaded
        asked = await asyncio.to_thread(prompts.completion, body, loaded, service.limits)
        return await respond(
            service, request, asked, "text_completion", lambda at: CompletionChoice(at, loaded.text_model), body.stream
        )

    @routes.post("/chat/completions", response_model=None, responses=answers(ChatAnswer))
    async def chat(body: ChatBody, request: Request) -> Response:
        service.check_model(body.model)
        loaded = service.loaded
        asked = await asyncio.to_thread(prompts.chat, body, loaded, service.limits)
        return await respond(
            service, request, asked, "chat.completion", lambda at: ChatChoice(at, loaded.text_model, asked), body.stream
        )

    return routes


async def respond(
    service: Service, request: Request, asked: Asked, kind: str, make: Callable[[int], Choice], stream: bool | None
) -> Response:
    """A stream or a whole answer. Refusals come before the first byte of either."""
    answer = Answer(service, asked, kind, make)
    if stream:
        return EventStream(await answer.stream(), service.limits.seconds + UNREAD_SECONDS)
    return JSONResponse(await while_connected(request, answer.whole()))


def _card(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "soli"}
