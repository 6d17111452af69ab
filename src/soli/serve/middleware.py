"""What every request passes first: the host name, the API key, a bounded body, strict JSON; and its line in the log.

The line is written when the request is over, with the id that the answer has as X-Request-Id, and holds no text of
prompts or answers. Plain ASGI, so that streams pass through unchanged.
"""

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soli.errors import SoliError
from soli.serve.errors import DISCONNECTED, error_response
from soli.serve.json_body import parse_body

OPEN_PATHS = ("/health", "/ready", "/")
OPEN_FOLDER = "/static/"
ID_HEADERS = (b"x-request-id", b"request-id")  # OpenAI's and Anthropic's
POLLED_PATHS = ("/health", "/ready", "/metrics")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")

log = logging.getLogger("soli.serve")

#: time.monotonic() at the arrival of the HTTP request that is being answered.
ARRIVAL_TIME: ContextVar[float] = ContextVar("arrival_time")


@dataclass(frozen=True)
class AccessRules:
    """`hosts`: names the Host header may have, without port ("*": any). `key` None: no key is required.

    `origins`: web pages of other hosts that may call (CORS), "*" for any; none by default. SoliError for an origin that
    no browser sends, which would match nothing, silently.
    """

    hosts: Sequence[str] = LOOPBACK
    key: str | None = None
    body_bytes: int = 4 * 2**20
    body_seconds: float = 60.0
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise SoliError(
                    f"the origin {origin!r} is none a browser sends: give scheme and host, with the port if it has "
                    "one and without a path, as https://example.org"
                )


class AccessMiddleware:
    """ASGI middleware: rejects what the rules forbid, limits the body, logs the request."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        request_id = f"req-{secrets.token_hex(8)}"
        status = body_bytes = 0
        ARRIVAL_TIME.set(start)

        async def send_with_id(message: Message) -> None:
            nonlocal status, body_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                ids = [(name, request_id.encode()) for name in ID_HEADERS]
                message = {**message, "headers": [*message.get("headers", ()), *ids]}
            body_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._answer(scope, receive, send_with_id)
        finally:
            fields = {
                "id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "bytes": body_bytes,
                "seconds": round(time.monotonic() - start, 4),
            }
            log.log(_log_level(scope["path"], status), "request", extra={"fields": fields})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        rejection = self._rejection(scope, {name.lower(): value for name, value in scope["headers"]})
        if rejection is None:
            await self._app(scope, self._limited(receive), send)
            return
        status, message = rejection
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        await error_response(scope["path"], status, message, headers)(scope, receive, send)

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, which rejects a body that is too large or arrives too slowly."""
        received = 0
        complete = False
        deadline = time.monotonic() + self._rules.body_seconds

        async def limited() -> Message:
            nonlocal received, complete
            try:
                async with asyncio.timeout(None if complete else deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the body did not arrive within {self._rules.body_seconds:g} seconds"
                ) from None
            if message["type"] == "http.disconnect" and not complete:
                raise HTTPException(DISCONNECTED)
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._rules.body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return limited

    def _rejection(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """(status, message) for a request that goes no further."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rsplit(":", 1)[0] if re.search(r":[0-9]+$", host) else host
        if "*" not in self._rules.hosts and name not in self._rules.hosts:
            return 421, "this host name is not served here: start the server with --allow-host for it"
        is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER)
        if not is_open and not self._has_key(headers):
            return 401, "an API key is required: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 15:
            return 400, "Content-Length is not a number of bytes"
        return (413, self._too_large()) if int(length) > self._rules.body_bytes else None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        if self._rules.key is None:
            return True
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        keys = [token] if scheme.lower() == b"bearer" else []
        if b"x-api-key" in headers:  # of Anthropic's clients
            keys.append(headers[b"x-api-key"])
        return any([hmac.compare_digest(key.strip(), self._rules.key.encode()) for key in keys])

    def _too_large(self) -> str:
        return f"the body has more than {self._rules.body_bytes} bytes, the limit of this server"


def _log_level(path: str, status: int) -> int:
    """INFO for answers of the API and for everything rejected; DEBUG for what a browser or a monitor fetches of itself.

    A probe that is answered with 503 while the model is loading is no news either.
    """
    is_page_file = path == "/" or path.startswith(OPEN_FOLDER)
    return logging.DEBUG if path in POLLED_PATHS or (is_page_file and status < 400) else logging.INFO


class _StrictRequest(Request):
    async def json(self) -> Any:
        return await parse_body(await self.body())


class StrictRoute(APIRoute):
    """The route class of every router with bodies, which json_body.py parses."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly
