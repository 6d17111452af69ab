"""The routes of the API: OpenAI's under /v1, Soli's own under /soli; whole answers, and streams of server-sent events.

Rejections come before the first byte of either. An answer is cancelled when its client disconnects.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from soli.analysis.parameters import count
from soli.serve import protocol_responses as protocol
from soli.serve.chat_prompts import chat_batch
from soli.serve.errors import ApiError, error_body
from soli.serve.middleware import StrictRoute
from soli.serve.prompts import RequestBatch, can_translate, completion_batch, translation_batch
from soli.serve.protocol_requests import ChatBody, CompletionBody, TranslateBody
from soli.serve.responses import CHAT, COMPLETION, TRANSLATION, AnswerFormat, ResponseBuilder
from soli.serve.service import LoadedModel, Service, ServiceLimits

log = logging.getLogger("soli.serve")

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorResponse} for status in (400, 401, 404, 408, 413, 421, 429, 500, 503, 504)
}
EVENT_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
UNREAD_SECONDS = 30.0  # how much longer than the answer its reader may take

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


def openai_router(service: Service) -> APIRouter:
    """Models, completions, chat completions."""
    routes = APIRouter(prefix="/v1", responses=ERRORS, route_class=StrictRoute)

    @routes.get("/models", response_model_exclude_unset=True)
    def models() -> protocol.ModelList:
        return protocol.ModelList(object="list", data=[model_card(service, name) for name in service.names])

    @routes.get("/models/{name:path}", response_model_exclude_unset=True)
    def model(name: Annotated[str, Path(min_length=1)]) -> protocol.ModelCard:
        service.check_model(name)
        return model_card(service, name)

    @routes.post("/completions", response_model=None, responses=described(COMPLETION))
    async def completions(body: CompletionBody, request: Request) -> Response:
        service.check_model(body.model)
        return await respond(service, request, body, completion_batch, COMPLETION, body.stream)

    @routes.post("/chat/completions", response_model=None, responses=described(CHAT))
    async def chat(body: ChatBody, request: Request) -> Response:
        service.check_model(body.model)
        return await respond(service, request, body, chat_batch, CHAT, body.stream)

    return routes


def soli_router(service: Service) -> APIRouter:
    """What the model is, what an expert was selected for, and translation."""
    routes = APIRouter(prefix="/soli", responses=ERRORS, route_class=StrictRoute)

    @routes.get("/model")
    def model() -> protocol.ModelDescription:
        return describe(service.name, service.loaded)

    @routes.get("/experts/{layer}/{expert}")
    def expert(
        layer: Annotated[int, Path(ge=0, le=10**6)],
        expert: Annotated[int, Path(ge=0, le=10**6)],
        limit: Annotated[int, Query(ge=1, le=32, deprecated=True, description="Without effect.")] = 12,
    ) -> protocol.ExpertReport:
        description = model()
        name = f"layers.{layer}"
        if name not in description.layers or expert >= description.experts:
            raise ApiError(404, f"there is no expert {expert} in layer {layer}: see /soli/model", "expert")
        return service.expert_statistics.report(name, expert)

    @routes.post("/translate", response_model=None, responses=described(TRANSLATION))
    async def translate(body: TranslateBody, request: Request) -> Response:
        return await respond(service, request, body, translation_batch, TRANSLATION, body.stream)

    return routes


def model_card(service: Service, name: str) -> protocol.ModelCard:
    """One of the model's names."""
    card = protocol.ModelCard(id=name, object="model", created=service.created, owned_by="soli")
    if service.context_length is not None:
        card.max_model_len = service.context_length
    return card


def described(answer_format: AnswerFormat) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of a route that answers with a whole response, or with a stream of its chunks."""
    return {200: {"model": answer_format.response, "content": {"text/event-stream": {}}}}


def describe(name: str, loaded: LoadedModel) -> protocol.ModelDescription:
    """The model's sizes, and what it can do."""
    config = loaded.text_model.model.config
    parameters = count(config)
    moe_layers = list(loaded.text_model.model.moe_layers())
    layers = [layer for layer, _ in moe_layers if layer.startswith("layers.")]
    router = moe_layers[0][1].gate if moe_layers else None
    supported: dict[protocol.ModelMode, bool] = {
        "chat": loaded.template is not None,
        "translate": can_translate(loaded),
        "complete": True,
    }
    return protocol.ModelDescription(
        name=name,
        layers=layers,
        experts=config.n_routed_experts if layers else 0,
        chosen=config.num_experts_per_tok if layers else 0,
        groups=router.G if router else 1,
        kept_groups=router.kept_groups if router else 1,
        total=parameters.total,
        activated=parameters.activated,
        modes=[mode for mode, is_supported in supported.items() if is_supported],
        context=loaded.text_model.positions,
    )


async def respond(
    service: Service,
    request: Request,
    body: Body,
    to_batch: Callable[[Body, LoadedModel, ServiceLimits], RequestBatch],
    answer_format: AnswerFormat,
    stream: bool | None,
) -> Response:
    """The answer to a body: a stream or a whole response."""
    try:
        batch = await asyncio.to_thread(to_batch, body, service.loaded, service.limits)
    except ApiError:
        service.check_accepting()  # the reason may be that the server is stopping
        raise
    builder = ResponseBuilder(service, batch, answer_format)
    events = await service.submit(batch.requests, batch.param_names)
    if stream:
        return EventStream(builder.chunks(events), service.limits.seconds + UNREAD_SECONDS)
    finished = await _run_while_connected(builder.whole(events), request.receive)
    if finished is None:
        raise ClientDisconnect
    response = finished.result()
    return await asyncio.to_thread(lambda: JSONResponse(protocol.to_json(response)))  # may be long


class EventStream(Response):
    """Each chunk as one `data:` line, then [DONE]; an error on the way is the last line before it, and one that nothing
    expects is logged. `chunks` is closed when the client disconnects, and after `seconds`, since a client that does not
    read could take for ever."""

    def __init__(self, chunks: AsyncGenerator[BaseModel, None], seconds: float) -> None:
        super().__init__()
        self._chunks = chunks
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS})
        finished = await _run_while_connected(self._send(send), receive, self._seconds)
        if finished is not None:
            finished.result()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._chunks), aclosing(self._data()) as lines:
            async for data in lines:
                line = f"data: {data}\n\n".encode()
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _data(self) -> AsyncGenerator[str, None]:
        try:
            async for chunk in self._chunks:
                yield json.dumps(protocol.to_json(chunk), ensure_ascii=False)
        except ApiError as error:
            yield json.dumps(error.body, ensure_ascii=False)
        except Exception as error:
            log.exception("a stream failed")
            message = f"the answer failed with {type(error).__name__}; the server's log has more"
            yield json.dumps(error_body(500, message))
        yield "[DONE]"


async def _run_while_connected(
    work: Coroutine[Any, Any, Result], receive: Receive, seconds: float | None = None
) -> asyncio.Task[Result] | None:
    """The finished task of `work`; None if it was cancelled, at the client's disconnect or after so many seconds."""
    working = asyncio.create_task(work)
    disconnect = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, disconnect), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return working if working.done() else None
    finally:
        disconnect.cancel()
        working.cancel()
        await asyncio.gather(working, disconnect, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
