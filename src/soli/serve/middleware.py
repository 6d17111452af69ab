"""What every request passes first: allowed host, the key, a bounded body; and one line of log when it is over, with the
id that the answer has as X-Request-Id.

The log (json_log.py) has no word of prompts or answers. Plain ASGI, so that streams pass through untouched.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soli.serve.errors import error_response

OPEN_PATHS = ("/health", "/ready", "/")
OPEN_FOLDER = "/static/"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")

log = logging.getLogger("soli.serve")

#: When the HTTP request that is being answered came in, as time.monotonic() has it.
ARRIVED: ContextVar[float] = ContextVar("arrived")


@dataclass(frozen=True)
class GateRules:
    """`hosts`: names the Host header may have, without port ("*": any). `key` None: no key is asked for."""

    hosts: Sequence[str] = LOOPBACK
    key: str | None = None
    body_bytes: int = 4 * 2**20
    body_seconds: float = 60.0


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, rules: GateRules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen, started, name = {"status": 0, "sent": 0}, time.monotonic(), f"req-{secrets.token_hex(8)}"

        ARRIVED.set(started)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", name.encode())]}
            seen["sent"] += len(message.get("body", b""))
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        finally:
            line = {
                "id": name,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": seen["status"],
                "bytes": seen["sent"],
                "seconds": round(time.monotonic() - started, 4),
            }
            polled = scope["path"] in ("/health", "/ready")
            log.log(logging.DEBUG if polled else logging.INFO, "request", extra={"fields": line})

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            headers_out = {"WWW-Authenticate": "Bearer"} if refusal[0] == 401 else None
            await error_response(*refusal, headers_out)(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _bounded(self, receive: Receive) -> Receive:
        """`receive`, which refuses a body that is too large or takes too long to come."""
        taken, complete = 0, False
        until = time.monotonic() + self._rules.body_seconds

        async def bounded() -> Message:
            nonlocal taken, complete
            try:
                async with asyncio.timeout(None if complete else until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not come within {self._rules.body_seconds:g} seconds") from None
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > self._rules.body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return bounded

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """(status, why) for a request that goes no further."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdigit() else host
        if "*" not in self._rules.hosts and name not in self._rules.hosts:
            return 421, "this host name is not served here: start the server with --allow-host for it"
        if not self._open(scope) and not self._has_key(headers):
            return 401, "a key is needed: send it as 'Authorization: Bearer KEY'"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 15:
            return 400, "Content-Length is no number of bytes"
        return (413, self._too_large()) if int(length) > self._rules.body_bytes else None

    def _open(self, scope: Scope) -> bool:
        return scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        if self._rules.key is None:
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._rules.key.encode())

    def _too_large(self) -> str:
        return f"the body has more than {self._rules.body_bytes} bytes, the most this server takes"
