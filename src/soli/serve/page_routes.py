"""The live page: `/` and `/static/…`, without a key, since nothing in its files is secret.

The page needs nothing but itself, and its Content-Security-Policy enforces that: no other origin, no inline script or
style, no HTML made from strings (trusted types). Only names in the table are served, so no path can lead elsewhere.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page: its bytes and all its headers."""

    content: bytes
    headers: dict[str, str]


@cache
def page_files() -> dict[str, PageFile]:
    """Every file by its URL path: `/` is the page, `/static/NAME` what it loads."""
    files = {f"/static/{path.name}": _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    return {"/": files.pop("/static/index.html"), **files}


def router() -> APIRouter:
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


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    tag = hashlib.sha256(content).hexdigest()[:16]
    # A newer Soli at the same address must not mix with cached files: always revalidate, mostly "not modified".
    headers = {"Content-Type": TYPES[path.suffix], "ETag": f'"{tag}"', "Cache-Control": "no-cache"}
    return PageFile(content, headers | SECURITY)
