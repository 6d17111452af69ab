"""The route of OpenAI's Responses API."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from soli.serve import protocol_responses as protocol
from soli.serve.answering import EventStream, error_responses, make_batch, named_lines, start, whole_response
from soli.serve.middleware import StrictRoute
from soli.serve.responses import CHAT
from soli.serve.responses_api.answers import ResponseItemsBuilder, ResponseObject
from soli.serve.responses_api.prompts import response_batch
from soli.serve.responses_api.requests import ResponsesBody
from soli.serve.service import Service

ERRORS = error_responses(protocol.ErrorResponse)
ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": ResponseObject, "content": {"text/event-stream": {}}}}


def responses_router(service: Service) -> APIRouter:
    """Responses, which are not stored."""
    routes = APIRouter(prefix="/v1", responses=ERRORS, route_class=StrictRoute)

    @routes.post("/responses", response_model=None, responses=ANSWER)
    async def responses(body: ResponsesBody, request: Request) -> Response:
        service.check_model(body.model)
        batch = await make_batch(service, body, response_batch)
        chat, events = await start(service, batch, CHAT)
        tokenizer = service.loaded.text_model.tokenizer
        sampling = batch.requests[0].sampling
        builder = ResponseItemsBuilder(body, service.name, sampling, lambda text: len(tokenizer.encode(text)))
        if body.stream:
            return EventStream(named_lines(builder.events(chat.chunks(events)), builder.failure), service)
        return await whole_response(builder.whole(chat.chunks(events)), request)

    return routes
