"""Running the server: a socket, uvicorn, the model loaded beside it, a shutdown that drains, and the JSON log.

SIGTERM and SIGINT stop accepting requests, let the answers in progress finish for a while, then end the process. A
model that cannot be loaded ends it with one sentence.
"""

import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
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
from soli.machine import memory_bytes
from soli.serve.app import create_app
from soli.serve.middleware import AccessRules
from soli.serve.service import LoadedModel, Service, ServiceLimits

log = logging.getLogger("soli.serve")

SWITCH_SECONDS = 0.001  # how long a thread that prepares a request may keep streams from running Python
LOADING_SECONDS = 2.0  # without a line about the model that is loaded, and between two of them
FLUSH_SECONDS = 2  # after the drain, for clients to read the ends of their answers
EXIT_SECONDS = 4.0  # after the drain the process has ended, whatever its threads compute


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and what `extra={"fields": …}` adds.

    Of an exception it has the type and the traceback's places in the code, not the message, which may quote a caller.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, frames = record.exc_info
            line["error"] = kind.__name__
            line["traceback"] = [f"{at.filename}:{at.lineno} {at.name}" for at in traceback.extract_tb(frames)]
        return json.dumps(line, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class ChatSettings:
    """How the server chats: `template`, a file in place of the folder's; `tool_parser`, the family whose calls are
    read, by default the folder's; `reasoning` False leaves it in the content; `generation_config` False leaves the
    folder's sampling defaults out."""

    template: Path | None = None
    tool_parser: str | None = None
    reasoning: bool = True
    generation_config: bool = True


class _DrainingServer(uvicorn.Server):
    """uvicorn's server, which lets the engine finish before it waits for connections to close."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server; signals after its end must not change the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the answers in progress; each is carried out within its time."""
        remaining = 0.0 if self.should_exit else self._drain_seconds
        deadline = threading.Timer(remaining + EXIT_SECONDS, _end_process)
        deadline.daemon = True
        deadline.start()
        self.force_exit = self.should_exit
        if self.should_exit:
            threading.Thread(target=self._service.abort, daemon=True).start()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._service.drain(self._drain_seconds)
        await super().shutdown(sockets)


def _end_process() -> None:
    """The end when Python's own has to wait: it joins threads, which may be in the middle of a long computation."""
    log.warning("ended in the middle of a computation")
    os._exit(0)


def run_server(
    model: str,
    names: Sequence[str],
    host: str,
    port: int,
    *,
    engine: EngineLimits,
    service: ServiceLimits,
    rules: AccessRules,
    drain_seconds: float,
    device: str = "cpu",
    dtype: str = "auto",
    memory: int | None = None,
    chat: ChatSettings | None = None,
    open_page: bool = False,
    log_level: str = "info",
) -> None:
    """Serves the model under `names` until a signal ends it; `open_page` shows the page in a browser once it is loaded.
    `log_level`: debug, info, warning or error. SoliError if the port is taken or the model cannot be loaded."""
    _check_cache(engine.cache_bytes, device)
    sys.setswitchinterval(SWITCH_SECONDS)
    listener = listen(host, port)
    model_service = Service(names, lambda: load(model, device, dtype, engine, memory, chat), service)
    configure_log(log_level)
    server = _uvicorn(create_app(model_service, rules), model_service, drain_seconds)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    print(f"soli: serving {model_service.name} on {url} (the API under /v1)", file=sys.stderr)
    model_service.start(
        on_failure=lambda _: setattr(server, "should_exit", True),
        on_ready=lambda: open_page and webbrowser.open(url),
    )
    server.run(sockets=[listener])
    if model_service.failure is not None:
        raise model_service.failure


def _check_cache(cache_bytes: int, device: str) -> None:
    memory = memory_bytes()
    if device == "cpu" and cache_bytes > memory:
        raise SoliError(
            f"a latent cache of {cache_bytes:,} bytes does not fit in this machine's memory of {memory:,} bytes: give "
            f"--cache-mib of at most {memory // 2**20}"
        )


def load(
    model: str,
    device: str,
    dtype: str,
    limits: EngineLimits,
    memory: int | None = None,
    chat: ChatSettings | None = None,
) -> LoadedModel:
    """A folder, or "nano", with its engine and its chat template. What a first request would wait for is done here. A
    template that cannot be used costs the chat alone, unless it was named."""
    chat = chat or ChatSettings()
    progress = LoadingLog(model).update
    text_model = open_text_model(model, device, dtype, limits.speculate, progress, memory)
    if not chat.generation_config:
        text_model = replace(text_model, sampling_defaults={})
    if text_model.sampling_defaults:
        log.info("sampling defaults of generation_config.json", extra={"fields": dict(text_model.sampling_defaults)})
    template = template_error = None
    try:
        folder = open_checkpoint(model).folder
        template = ChatTemplate.from_folder(folder, text_model.tokenizer, chat.template, chat.tool_parser)
    except SoliError as error:
        if chat.template is not None:
            raise
        template_error = str(error)
        log.warning("no chat", extra={"fields": {"reason": template_error}})
    engine = Engine(text_model, limits)
    if text_model.budget is not None:
        log.info("%s", text_model.budget)
    with suppress(SoliError):  # a request with a constraint is told
        engine.prepare_constraints()
    _ = text_model.tokenizer.longest_token
    gc.collect()
    gc.freeze()  # what was loaded stays: no collection traverses it again, which stops all threads for its time
    return LoadedModel(text_model, AsyncEngine(engine), template, template_error, chat.reasoning)


class LoadingLog:
    """How far loading is: a line of the log each time it has taken two seconds more."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._last_line = time.monotonic()

    def update(self, bytes_read: int, total: int) -> None:
        """`bytes_read` of `total` bytes of weights are loaded."""
        if time.monotonic() - self._last_line < LOADING_SECONDS:
            return
        self._last_line = time.monotonic()
        fields = {"model": self._model, "bytes": bytes_read, "of": total, "percent": round(100 * bytes_read / total)}
        log.info("loading", extra={"fields": fields})


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; SoliError if there cannot be one. TCP is named, since asyncio sets TCP_NODELAY only then, and
    without it an answer waits for the acknowledgement of its own headers, 40 ms."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise SoliError(f"cannot listen on {host} port {port} ({error.strerror}): choose another --port") from error
    return listener


def on_desktop() -> bool:
    """Whether a person sits at a terminal of a machine with a screen."""
    has_screen = sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    return has_screen and sys.stderr.isatty() and "SSH_CONNECTION" not in os.environ


def configure_log(level: str) -> None:
    """The JSON log on standard error. "debug" adds lines of Soli only: what libraries log there may quote a request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    own_level = getattr(logging, level.upper())
    logging.basicConfig(handlers=[handler], level=max(own_level, logging.INFO))
    logging.getLogger("soli").setLevel(own_level)
    for name in ("uvicorn", "uvicorn.error", "httpx"):
        logging.getLogger(name).setLevel(max(own_level, logging.WARNING))


def _uvicorn(app: ASGIApp, service: Service, drain_seconds: float) -> _DrainingServer:
    return _DrainingServer(
        uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=FLUSH_SECONDS,
        ),
        service,
        drain_seconds,
    )
