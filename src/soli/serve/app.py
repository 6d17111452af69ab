"""The server as one ASGI application: routes, errors in OpenAI's format, and the middleware that every request passes.

/health is 200 while the model is loaded and its engine runs, /ready only while new requests are accepted as well; both
are open, as is the page. Everything else requires the API key, if one is set.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from soli import __version__
from soli.errors import SoliError
from soli.serve import openai_routes, page_routes, soli_routes
from soli.serve.errors import HANDLERS
from soli.serve.middleware import AccessMiddleware, AccessRules
from soli.serve.protocol_responses import HealthStatus, to_json
from soli.serve.service import Service

NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": HealthStatus, "description": "Not ready"}}


@dataclass(frozen=True)
class AppRules:
    """`origins`: web pages of other hosts that may call (CORS), "*" for any; none by default. SoliError for an origin
    that no browser sends, which would match nothing, silently."""

    access: AccessRules = field(default_factory=AccessRules)
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise SoliError(
                    f"the origin {origin!r} is none a browser sends: give scheme and host, with the port if it has "
                    "one and without a path, as https://example.org"
                )


def create_app(service: Service, rules: AppRules | None = None) -> ASGIApp:
    """The application; `service.start` starts loading its model."""
    rules = rules or AppRules()
    app = FastAPI(title="Soli", version=__version__, docs_url=None, redoc_url=None, exception_handlers=HANDLERS)
    _add_probes(app, service)
    app.include_router(openai_routes.router(service))
    app.include_router(soli_routes.router(service))
    app.include_router(page_routes.router())
    protected = AccessMiddleware(app, rules.access)
    if not rules.origins:
        return protected
    # CORS is outermost: a browser's preflight has no key, and the browser must be able to read a rejection.
    return CORSMiddleware(
        protected,
        allow_origins=rules.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=HealthStatus, responses=NOT_READY)
    def health() -> JSONResponse:
        return _health(service, healthy=("ready", "stopping"))

    @app.get("/ready", response_model=HealthStatus, responses=NOT_READY)
    def ready() -> JSONResponse:
        return _health(service, healthy=("ready",))

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _health(service: Service, healthy: Sequence[str]) -> JSONResponse:
    status = service.status
    return JSONResponse(to_json(HealthStatus(status=status)), 200 if status in healthy else 503)
