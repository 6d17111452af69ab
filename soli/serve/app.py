"""The server as one ASGI application: routes, errors in OpenAI's shape, and the gate that every request passes.

/health says that the process lives, /ready that the model answers; both are open, as is the page. Everything else
needs the key where one is set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from soli import __version__
from soli.errors import SoliError
from soli.serve import errors, openai_routes, page_routes, soli_routes
from soli.serve.gate import Gate, GateRules
from soli.serve.service import Service


@dataclass(frozen=True)
class AppRules:
    """`origins`: web pages of other hosts that may call (CORS); none by default."""

    gate: GateRules = field(default_factory=GateRules)
    origins: Sequence[str] = ()


def create_app(service: Service, rules: AppRules | None = None) -> ASGIApp:
    """The application; `service.start` begins to load its model."""
    rules = rules or AppRules()
    app = FastAPI(title="Soli", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(errors.ApiError, errors.on_api_error)
    app.add_exception_handler(AnyHTTPException, errors.on_http_error)
    app.add_exception_handler(RequestValidationError, errors.on_invalid)
    app.add_exception_handler(SoliError, errors.on_soli_error)
    app.add_exception_handler(Exception, errors.on_anything)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    def ready() -> JSONResponse:
        said = "ready" if service.ready else "loading" if service.failure is None else f"failed: {service.failure}"
        return JSONResponse({"status": said}, 200 if service.ready else 503)

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
