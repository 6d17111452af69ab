"""A headless Chromium for the page's tests, which are skipped, with the reason, where there is none."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.serve.page.driving import until
from tests.serve.page.mock_server import MockServer


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Closed before other tests run: while Playwright works, its event loop counts as running in this thread."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium, or CHROMIUM=path")
    with sync_api.sync_playwright() as playwright:
        chromium_browser = playwright.chromium.launch(executable_path=chromium)
        yield chromium_browser
        chromium_browser.close()


@pytest.fixture
def mock() -> Iterator[MockServer]:
    with MockServer() as server:
        yield server


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a server's page, in the detailed view, and waits for the answer to the example that runs at the start. At
    the end: no error was logged, no other origin was requested, nothing was stored but the choice of the view.

    `complaints` are texts that the console may have (a rejected key is logged by the browser itself);
    `watch` is a script that runs before the page's own; `ready` False returns at once; `fragment` is the address's.
    A stand-in's list of requests begins after the example.
    """
    opened: list[tuple[Any, str, list[str], list[str], tuple[str, ...]]] = []

    def open_in_browser(
        server: Any,
        complaints: tuple[str, ...] = (),
        ready: bool = True,
        watch: str = "",
        view: str = "detailed",
        fragment: str = "",
        **options: Any,
    ) -> Any:
        options = {"viewport": {"width": 1280, "height": 900}, "locale": "en-GB", "color_scheme": "light", **options}
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(30000)
        errors: list[str] = []
        requests: list[str] = []
        page.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        opened.append((page, server.url, errors, requests, complaints))
        page.add_init_script(watch)
        if view == "detailed":
            page.add_init_script("localStorage.setItem('soli.view', 'detailed')")
        page.goto(f"{server.url}/{fragment}")
        if ready:
            page.wait_for_selector("body:not(.loading)")
            until(page, "!document.querySelector('#run').hidden")
            getattr(server, "requests", []).clear()
        return page

    yield open_in_browser
    for page, url, errors, requests, complaints in opened:
        assert [error for error in errors if not any(complaint in error for complaint in complaints)] == []
        assert [request for request in requests if not request.startswith(f"{url}/")] == []
        stored = page.evaluate("[Object.entries(localStorage), sessionStorage.length, document.cookie]")
        assert stored in ([[], 0, ""], [[["soli.view", "detailed"]], 0, ""])
        page.context.close()
