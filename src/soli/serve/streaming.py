"""Server-sent events: several event streams of the engine merged into one, written as `data:` lines, and ended when the
client disconnects."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from soli.engine.async_engine import AsyncEvents
from soli.engine.request import Event
from soli.serve.errors import ApiError, error_body
from soli.serve.protocol_responses import to_json

Result = TypeVar("Result")
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class EventStream(Response):
    """Each chunk as one `data:` line, then [DONE]; an error on the way is the last line before it. `chunks` is closed
    when the client disconnects, and after `seconds`, since a client that does not read could take for ever."""

    def __init__(self, chunks: AsyncGenerator[BaseModel, None], seconds: float) -> None:
        self.status_code = 200
        self.background = None
        self._chunks = chunks
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await _run_while_connected(self._send(send), receive, self._seconds)

    async def _send(self, send: Send) -> None:
        try:
            try:
                async for chunk in self._chunks:
                    await _send_json(send, to_json(chunk))
            except ApiError as error:
                await _send_json(send, error.body)
            except Exception as error:
                await _send_json(send, error_body(500, f"the answer failed with {type(error).__name__}"))
                raise
            await _send_data(send, "[DONE]")
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self._chunks.aclose()


async def while_connected(request: Request, answer: Coroutine[Any, Any, Result]) -> Result:
    """The answer's result; it is cancelled when the client disconnects."""
    finished = await _run_while_connected(answer, request.receive)
    if finished is None:
        raise ClientDisconnect
    return finished.result()


async def merge_events(streams: Sequence[AsyncEvents], seconds: float) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all streams as they come, each with its stream's index. All streams are closed at the end, also
    when the caller leaves early, and after so many seconds (ApiError 504)."""
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncEvents) -> None:
        async for event in stream:
            queue.put_nowait((index, event))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    deadline = asyncio.get_running_loop().time() + seconds
    unfinished = len(streams)
    try:
        while unfinished:
            async with asyncio.timeout_at(deadline):
                index, event = await queue.get()
            unfinished -= event.finish_reason is not None
            yield index, event
    except TimeoutError:
        raise ApiError(504, f"the answer took longer than {seconds:g} seconds: ask for fewer tokens") from None
    finally:
        for task, stream in zip(tasks, streams, strict=True):
            task.cancel()
            stream.close()


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


async def _send_json(send: Send, value: dict[str, Any]) -> None:
    await _send_data(send, json.dumps(value, ensure_ascii=False))


async def _send_data(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
