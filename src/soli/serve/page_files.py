"""The live page as it lies in the package: which files there are, their types, and the headers they go out with.

The page needs nothing but itself, and its Content-Security-Policy holds it to that: no other origin, no inline script
or style, no HTML made from strings (trusted types). Only names in the table are served, so no path can lead elsewhere.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
    """One file of the page: its bytes and every header it is sent with."""

    content: bytes
    headers: dict[str, str]


@cache
def page_files() -> dict[str, PageFile]:
    """Every file by the path it is asked for: `/` is the page, `/static/NAME` what it loads."""
    found = {f"/static/{path.name}": _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    return {"/": found.pop("/static/index.html"), **found}


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    tag = hashlib.sha256(content).hexdigest()[:16]
    # A newer Soli at the same address must not meet older files: always ask, mostly be told "not modified".
    headers = {"Content-Type": TYPES[path.suffix], "ETag": f'"{tag}"', "Cache-Control": "no-cache"}
    return PageFile(content, headers | SECURITY)
