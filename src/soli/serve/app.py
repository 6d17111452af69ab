"""The server as one ASGI application: routes, errors in OpenAI's shape, and the gate that every request passes.

/health says that the model is there and its engine runs, /ready that new requests are taken as well; both are open, as
is the page. Everything else needs the key where one is set.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from soli import __version__
from soli.errors import SoliError
from soli.serve import errors, openai_routes, page_routes, soli_routes
from soli.serve.middleware import Gate, GateRules
from soli.serve.service import Service

UNREADY: dict[int | str, dict[str, Any]] = {503: {"description": "Not ready; `status` says why"}}


@dataclass(frozen=True)
class AppRules:
    """`origins`: web pages of other hosts that may call (CORS), "*" for any; none by default. SoliError for what no
    browser would send: it would match nothing, and nobody would be told."""

    gate: GateRules = field(default_factory=GateRules)
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise SoliError(
                    f"the origin {origin!r} is none a browser sends: give scheme and host, with the port if it has "
                    "one and without a path, as https://example.org"
                )


def create_app(service: Service, rules: AppRules | None = None) -> ASGIApp:
    """The application; `service.start` begins to load its model."""
    rules = rules or AppRules()
    app = FastAPI(title="Soli", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(errors.ApiError, errors.on_api_error)
    app.add_exception_handler(AnyHTTPException, errors.on_http_error)
    app.add_exception_handler(RequestValidationError, errors.on_invalid)
    app.add_exception_handler(SoliError, errors.on_soli_error)
    app.add_exception_handler(Exception, errors.on_anything)

    @app.get("/health", responses=UNREADY)
    def health() -> JSONResponse:
        status = service.status
        return JSONResponse({"status": status}, 200 if status in ("ready", "stopping") else 503)

    @app.get("/ready", responses=UNREADY)
    def ready() -> JSONResponse:
        status = service.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    app.include_router(openai_routes.router(service))
    app.include_router(soli_routes.router(service))
    app.include_router(page_routes.router())
    gated = Gate(app, rules.gate)
    if not rules.origins:
        return gated
    # Outside the gate: a browser asks whether it may before it sends the key, and must be able to read a refusal.
    headers = ["Authorization", "Content-Type"]
    return CORSMiddleware(gated, allow_origins=rules.origins, allow_methods=["GET", "POST"], allow_headers=headers)
