"""What the routes stand on: one model with its engine, loaded while the server already answers.

Whoever is asked before the model is there says so (503); a model that cannot be loaded ends the server.
"""

import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass

from soli.chat.templates import ChatTemplate
from soli.engine.async_engine import AsyncEngine, AsyncEvents
from soli.engine.request import Event, QueueFull, Refused, Request
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.serve.errors import ApiError
from soli.serve.expert_log import ExpertLog
from soli.serve.merge import merged
from soli.serve.metrics import Metrics
from soli.serve.middleware import ARRIVED

log = logging.getLogger("soli.serve")

RETRY_SECONDS = 1


@dataclass(frozen=True)
class Loaded:
    """A model that is ready. `template` None: it was not trained to chat."""

    text_model: TextModel
    engine: AsyncEngine
    template: ChatTemplate | None


@dataclass(frozen=True)
class ServiceLimits:
    """What one HTTP request may ask for."""

    prompt_tokens: int = 2**20
    choices: int = 16  # n times prompts
    seconds: float = 600.0


class Service:
    """`load` is run on a thread of its own by `start`; `failure` is what it raised, if it did."""

    def __init__(self, name: str, load: Callable[[], Loaded], limits: ServiceLimits | None = None) -> None:
        self.name, self.limits = name, limits or ServiceLimits()
        self.created = int(time.time())
        self.failure: Exception | None = None
        self.metrics = Metrics(self)
        self.experts = ExpertLog()
        self._load, self._draining = load, False
        self._loaded: Loaded | None = None

    def start(
        self,
        on_failure: Callable[[Exception], None] = lambda _: None,
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        """Begins to load."""

        def run() -> None:
            began = time.monotonic()
            try:
                self._loaded = self._load()
                log.info("ready", extra={"fields": {"model": self.name, "seconds": round(time.monotonic() - began, 3)}})
            except Exception as error:
                self.failure = error
                on_failure(error)
            else:
                on_ready()

        threading.Thread(target=run, name="soli-load", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether requests are answered: the model is there, its engine healthy, nobody has said to stop."""
        return self.status == "ready"

    @property
    def status(self) -> str:
        """One word, and why where it failed: "loading", "ready", "stopping", "failed: …"."""
        if self.failure is not None:
            return f"failed: {self.failure}"
        if self._loaded is None:
            return "loading"
        if self._draining:
            return "stopping"
        return "ready" if self._loaded.engine.healthy else "failed: the engine stopped; the log has more"

    @property
    def loaded(self) -> Loaded:
        """The model; ApiError 503 as long as there is none."""
        if self._loaded is None:
            said = "the model is still being loaded" if self.failure is None else f"no model: {self.failure}"
            raise ApiError(503, f"{said}: ask /ready", retry_after=RETRY_SECONDS)
        return self._loaded

    @property
    def loaded_or_none(self) -> Loaded | None:
        return self._loaded

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, lets the answers under way end for so long, then ends them."""
        self._draining = True
        log.info("stopping", extra={"fields": {"drain_seconds": seconds}})
        if self._loaded is not None:
            await self._loaded.engine.drain(seconds)

    def abort(self) -> None:
        """Ends the answers under way."""
        if self._loaded is not None:
            self._loaded.engine.close()

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for another model than the one that is served."""
        if name is not None and name != self.name:
            raise ApiError(404, f"there is no model {name[:80]!r} here: this server has {self.name}", "model")

    async def play(
        self, requests: Sequence[Request], params: Mapping[str, str]
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Hands all requests over and returns the iterator of their events, each with its request's place; closing it
        cancels what is not finished. ApiError where the engine refuses one, with the `params` of the field of the
        request that is to blame; then none is run."""
        if self._draining:
            raise ApiError(503, "the server is shutting down: ask again when it is back", retry_after=RETRY_SECONDS)
        arrived = ARRIVED.get(time.monotonic())
        streams: list[AsyncEvents] = []
        try:
            for request in requests:
                streams.append(await self.loaded.engine.submit(request))
        except QueueFull as error:
            _close(streams)
            self.metrics.refused.inc()
            raise ApiError(429, str(error), code="queue_full", retry_after=RETRY_SECONDS) from error
        except SoliError as error:
            _close(streams)
            if not self.ready:  # told to stop meanwhile
                raise ApiError(503, str(error), retry_after=RETRY_SECONDS) from error
            field = error.field if isinstance(error, Refused) else "constraint"
            too_long = isinstance(error, Refused) and error.too_long
            code = "context_length_exceeded" if too_long else None
            raise ApiError(400, str(error), params.get(field), code) from error
        except BaseException:
            _close(streams)
            raise
        return self.metrics.timed(merged(streams, self.limits.seconds), len(requests), arrived)


def _close(streams: Sequence[AsyncEvents]) -> None:
    for stream in streams:
        stream.close()
