"""Server-sent events, and noticing that the other side has gone while an answer is being made."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from soli.serve.errors import ApiError, error_body

Answer = TypeVar("Answer")
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class EventStream(Response):
    """Each object as one `data:` line, then [DONE]; an error on the way is the last object. When the client goes away,
    `events` is closed at once; so it is after `seconds`, which a client that does not read could stretch for ever."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], seconds: float) -> None:
        self.status_code, self.background, self._events, self._seconds = 200, None, events, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        sending, gone = asyncio.create_task(self._send(send)), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sending, gone), timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            sending.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        try:
            try:
                async for value in self._events:
                    await _put(send, json.dumps(value, ensure_ascii=False))
            except ApiError as error:
                await _put(send, json.dumps(error.body(), ensure_ascii=False))
            except Exception as error:
                await _put(send, json.dumps(error_body(500, f"the answer failed with {type(error).__name__}")))
                raise
            await _put(send, "[DONE]")
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self._events.aclose()


async def while_connected(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer; given up when the client goes away."""
    working, gone = asyncio.create_task(answer), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _put(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
