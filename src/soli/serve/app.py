"""The server as one ASGI application: the API's routes, the probes, the live page, and what every request passes first.

/health is 200 while the model is loaded and its engine runs, /ready only while new requests are accepted as well; both
are open, as is the page. Everything else requires the API key, if one is set.

The page needs nothing but itself, and its Content-Security-Policy enforces that: no other origin, no inline script or
style, no HTML made from strings (trusted types). Only names in the table are served, so no path can lead elsewhere.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from soli import __version__
from soli.serve.errors import HANDLERS
from soli.serve.messages_api.routes import anthropic_router
from soli.serve.middleware import AccessMiddleware, AccessRules
from soli.serve.protocol_responses import HealthStatus, to_json
from soli.serve.responses_api.routes import responses_router
from soli.serve.routes import openai_router, soli_router
from soli.serve.service import Service
from soli.serve.tokenizing import tokenizer_router

NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": HealthStatus, "description": "Not ready"}}
PAGE_FOLDER = Path(__file__).parent / "page"
PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def create_app(service: Service, rules: AccessRules | None = None) -> ASGIApp:
    """The application; `service.start` starts loading its model."""
    rules = rules or AccessRules()
    app = FastAPI(title="Soli", version=__version__, docs_url=None, redoc_url=None, exception_handlers=HANDLERS)
    for router in (_probes(service), *_api(service), _page()):
        app.include_router(router)
    protected = AccessMiddleware(app, rules)
    if not rules.origins:
        return protected
    # CORS is outermost: a browser's preflight has no key, and the browser must be able to read a rejection.
    return CORSMiddleware(
        protected,
        allow_origins=rules.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-Api-Key", "Anthropic-Version", "Anthropic-Beta"],
    )


def _api(service: Service) -> tuple[APIRouter, ...]:
    routers = (openai_router, responses_router, anthropic_router, tokenizer_router, soli_router)
    return tuple(router(service) for router in routers)


def _probes(service: Service) -> APIRouter:
    routes = APIRouter()

    def answer(*healthy: str) -> JSONResponse:
        status = service.status
        return JSONResponse(to_json(HealthStatus(status=status)), 200 if status in healthy else 503)

    @routes.get("/health", response_model=HealthStatus, responses=NOT_READY)
    def health() -> JSONResponse:
        return answer("ready", "stopping")

    @routes.get("/ready", response_model=HealthStatus, responses=NOT_READY)
    def ready() -> JSONResponse:
        return answer("ready")

    @routes.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return routes


@dataclass(frozen=True)
class PageFile:
    """One file of the page: its bytes and all its headers."""

    content: bytes
    headers: dict[str, str]


@cache
def page_files() -> dict[str, PageFile]:
    """Every file by its URL path: `/` is the page, `/static/NAME` what it loads."""
    files = {}
    for path in sorted(PAGE_FOLDER.iterdir()):
        if path.suffix in PAGE_TYPES:
            content = path.read_bytes()
            tag = hashlib.sha256(content).hexdigest()[:16]
            # A newer Soli at the same address must not mix with cached files: always revalidate, mostly "not modified".
            headers = {"Content-Type": PAGE_TYPES[path.suffix], "ETag": f'"{tag}"', "Cache-Control": "no-cache"}
            files[f"/static/{path.name}"] = PageFile(content, headers | PAGE_SECURITY)
    return {"/": files.pop("/static/index.html"), **files}


def _page() -> APIRouter:
    """Routes for the files of the page; anything else under /static is not found."""
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    @routes.api_route("/static/{name}", methods=["GET", "HEAD"])
    def page(request: Request) -> Response:
        file = page_files().get(request.url.path)
        if file is None:
            raise HTTPException(404)
        if request.headers.get("if-none-match") == file.headers["ETag"]:
            return Response(status_code=304, headers=file.headers)
        return Response(file.content, headers=file.headers)

    return routes
