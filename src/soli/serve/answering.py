"""From a body to its HTTP response: whole, or a stream of server-sent events, on every route that generates.

Rejections come before the first byte of either. An answer is cancelled when its client disconnects.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from soli.engine.request import Event
from soli.serve import protocol_responses as protocol
from soli.serve.errors import ApiError
from soli.serve.prompts import RequestBatch
from soli.serve.responses import AnswerFormat, ResponseBuilder
from soli.serve.service import LoadedModel, Service, ServiceLimits

log = logging.getLogger("soli.serve")

EVENT_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
ERROR_STATUSES = (400, 401, 404, 408, 413, 421, 429, 500, 503, 504)
UNREAD_SECONDS = 30.0  # how much longer than the answer its reader may take

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")
ToBatch = Callable[[Body, LoadedModel, ServiceLimits], RequestBatch]
Events = AsyncGenerator[tuple[int, Event], None]
Lines = AsyncGenerator[str, None]


def error_responses(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the description of a route that generates: an API's form of errors, for every status that it may have."""
    return {status: {"model": model} for status in ERROR_STATUSES}


async def make_batch(service: Service, body: Body, to_batch: ToBatch[Body]) -> RequestBatch:
    """The engine's requests of a body, made in a thread of its own."""
    try:
        return await asyncio.to_thread(to_batch, body, service.loaded, service.limits)
    except ApiError:
        service.check_accepting()  # the reason may be that the server is stopping
        raise


async def start(service: Service, batch: RequestBatch, answer_format: AnswerFormat) -> tuple[ResponseBuilder, Events]:
    """Submits a batch; what builds its response, and the events to build it from."""
    builder = ResponseBuilder(service, batch, answer_format)
    return builder, await service.submit(batch.requests, batch.param_names)


async def respond(
    service: Service,
    request: Request,
    body: Body,
    to_batch: ToBatch[Body],
    answer_format: AnswerFormat,
    stream: bool | None,
) -> Response:
    """The answer to a body of OpenAI's completions or chats, or of Soli's own routes."""
    builder, events = await start(service, await make_batch(service, body, to_batch), answer_format)
    if stream:
        return EventStream(_data_lines(builder.chunks(events), request.url.path), service)
    return await whole_response(builder.whole(events), request)


async def whole_response(work: Coroutine[Any, Any, BaseModel], request: Request) -> JSONResponse:
    """What `work` returns, as JSON; ClientDisconnect if nobody waits for it any more."""
    finished = await run_while_connected(work, request.receive)
    if finished is None:
        raise ClientDisconnect
    return JSONResponse(protocol.to_json(finished.result()))


class EventStream(Response):
    """Server-sent events. `lines` is closed when the client disconnects, and some time after the longest answer, since
    a client that does not read could take for ever."""

    def __init__(self, lines: Lines, service: Service) -> None:
        super().__init__()
        self._lines = lines
        self._seconds = service.limits.seconds + UNREAD_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS})
        finished = await run_while_connected(self._send(send), receive, self._seconds)
        if finished is not None:
            finished.result()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._lines):
            async for line in self._lines:
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _data_lines(chunks: AsyncGenerator[BaseModel, None], path: str) -> Lines:
    """Each chunk as a `data:` line, then [DONE]; an error on the way is the last line before it, and one that nothing
    expects is logged."""
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield f"data: {_json(chunk)}\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body(path), ensure_ascii=False)}\n\n"
        except Exception as error:
            yield f"data: {json.dumps(_unexpected(error).body(path))}\n\n"
        yield "data: [DONE]\n\n"


async def named_lines(events: AsyncGenerator[BaseModel, None], to_event: Callable[[ApiError], BaseModel]) -> Lines:
    """Events with a name each, their field `type`; an error on the way is the last of them, as `to_event` makes it."""
    async with aclosing(events):
        try:
            async for event in events:
                yield _named(event)
        except ApiError as error:
            yield _named(to_event(error))
        except Exception as error:
            yield _named(to_event(_unexpected(error)))


def _unexpected(error: Exception) -> ApiError:
    """A bug in the middle of an answer: the log has it, its client learns only its type."""
    log.exception("a stream failed")
    return ApiError(500, f"the answer failed with {type(error).__name__}; the server's log has more")


def _named(event: BaseModel) -> str:
    data = protocol.to_json(event)
    return f"event: {data['type']}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _json(chunk: BaseModel) -> str:
    return json.dumps(protocol.to_json(chunk), ensure_ascii=False)


async def run_while_connected(
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
