"""Running the server: a socket, uvicorn, the model loaded beside it, and an end that drains.

SIGTERM and SIGINT stop taking requests, let the answers under way end for a while, then end the process. A model that
cannot be loaded ends it with one sentence.
"""

import logging
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from soli.chat.templates import ChatTemplate
from soli.checkpoint import open_checkpoint
from soli.engine.async_engine import AsyncEngine
from soli.engine.engine import Engine
from soli.engine.request import EngineLimits
from soli.engine.text_model import open_text_model
from soli.errors import SoliError
from soli.serve.app import AppRules, create_app
from soli.serve.json_log import JsonLines
from soli.serve.service import Loaded, Service, ServiceLimits


def load(model: str, device: str, dtype: str, limits: EngineLimits) -> Loaded:
    """A folder, or "nano", with its engine and its chat template."""
    text_model = open_text_model(model, device, dtype, mtp=limits.speculate)
    template = ChatTemplate.from_folder(open_checkpoint(model).folder, text_model.tokenizer)
    return Loaded(text_model, AsyncEngine(Engine(text_model, limits)), template)


class _Server(uvicorn.Server):
    """uvicorn's server, which lets the engine finish before it waits for connections to close."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server; what comes after it has ended must not change the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the answers under way."""
        self.force_exit = self.should_exit
        if self.should_exit:
            threading.Thread(target=self._service.abort, daemon=True).start()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._service.drain(self._drain_seconds)
        await super().shutdown(sockets)


def run_server(
    model: str,
    name: str,
    host: str,
    port: int,
    *,
    engine: EngineLimits,
    service: ServiceLimits,
    rules: AppRules,
    drain_seconds: float,
    device: str = "cpu",
    dtype: str = "auto",
    open_page: bool = False,
) -> None:
    """Serves until it is told to stop; `open_page` shows the page in a browser once the model is loaded. SoliError
    where the port is taken or the model cannot be loaded."""
    bound = listen(host, port)
    made = Service(name, lambda: load(model, device, dtype, engine), service)
    server = _uvicorn(create_app(made, rules), made, drain_seconds)
    url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/"
    print(f"soli: serving {name} on {url} (the API under /v1)", file=sys.stderr)
    made.start(lambda _: setattr(server, "should_exit", True), lambda: open_page and webbrowser.open(url))
    server.run(sockets=[bound])
    if made.failure is not None:
        raise made.failure


def on_desktop() -> bool:
    """Whether somebody sits at a terminal of a machine with a screen."""
    screen = sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    return screen and sys.stderr.isatty() and "SSH_CONNECTION" not in os.environ


def _uvicorn(app: ASGIApp, service: Service, drain_seconds: float) -> _Server:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    for quiet in ("uvicorn", "uvicorn.error", "httpx"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=5,
    )
    return _Server(config, service, drain_seconds)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; SoliError where that cannot be. TCP is named: only then asyncio sets TCP_NODELAY, and without
    it an answer waits for the acknowledgement of its own headers, 40 ms."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(1024)
    except OSError as error:
        bound.close()
        raise SoliError(f"cannot listen on {host} port {port} ({error.strerror}): choose another --port") from error
    return bound
