"""What the routes depend on: one model with its engine, loaded while the server already answers.

A request that arrives before the model is loaded gets a 503; a model that cannot be loaded ends the server.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass

from soli.chat.templates import ChatTemplate
from soli.engine.async_engine import AsyncEngine, AsyncEvents
from soli.engine.request import EngineStats, Event, QueueFull, RejectedRequest, Request
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.serve.errors import ApiError
from soli.serve.metrics import ExpertStatistics, ServerMetrics
from soli.serve.middleware import ARRIVAL_TIME

log = logging.getLogger("soli.serve")

RETRY_SECONDS = 1


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready. `template` None: it was not trained to chat, or `template_error` says why it cannot.
    `split_reasoning` False: reasoning is content."""

    text_model: TextModel
    engine: AsyncEngine
    template: ChatTemplate | None
    template_error: str | None = None
    split_reasoning: bool = True


@dataclass(frozen=True)
class ServiceLimits:
    """The most that one HTTP request may ask for."""

    prompt_tokens: int = 2**20
    choices: int = 16  # n times prompts
    seconds: float = 600.0


class Service:
    """`load` runs in a thread that `start` starts; `failure` is what it raised, if it did. `names`: what requests may
    call the model; answers have the first."""

    def __init__(
        self, names: str | Sequence[str], load: Callable[[], LoadedModel], limits: ServiceLimits | None = None
    ) -> None:
        self.names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        self.name = self.names[0]
        self.limits = limits or ServiceLimits()
        self.created = int(time.time())
        self.failure: Exception | None = None
        self.metrics = ServerMetrics(lambda: self.ready, self.engine_stats)
        self.expert_statistics = ExpertStatistics()
        self._load = load
        self._draining = False
        self._loaded: LoadedModel | None = None

    def start(
        self,
        on_failure: Callable[[Exception], None] = lambda _: None,
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        """Starts loading. `on_failure`: without a model, or when ranks do not compute it together any more."""

        def fail(error: Exception) -> None:
            self.failure = error
            on_failure(error)

        def run() -> None:
            start = time.monotonic()
            try:
                self._loaded = self._load()
            except Exception as error:
                fail(error)
            else:
                leader = self._loaded.text_model.leader
                if leader is not None:
                    leader.on_failure = lambda reason: fail(SoliError(reason))
                seconds = round(time.monotonic() - start, 3)
                log.info("ready", extra={"fields": {"model": self.name, "seconds": seconds}})
                on_ready()

        threading.Thread(target=run, name="soli-load", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether requests are accepted: the model is loaded, its engine runs, the server is not stopping."""
        return self.status == "ready"

    @property
    def status(self) -> str:
        """ "loading", "ready", "stopping", or "failed: …" with the reason."""
        if self.failure is not None:
            return f"failed: {self.failure}"
        if self._loaded is None:
            return "loading"
        if self._draining:
            return "stopping"
        return "ready" if self._loaded.engine.healthy else "failed: the engine stopped; the log has more"

    @property
    def loaded(self) -> LoadedModel:
        """The model; ApiError 503 as long as there is none."""
        if self._loaded is None:
            reason = "the model is still being loaded" if self.failure is None else f"no model: {self.failure}"
            raise ApiError(503, f"{reason}: ask /ready", retry_after=RETRY_SECONDS)
        return self._loaded

    def engine_stats(self) -> tuple[EngineStats, Sequence[str]] | None:
        """The engine's statistics and the names of the model's MoE layers; None without a model."""
        if self._loaded is None:
            return None
        return self._loaded.engine.stats(), [name for name, _ in self._loaded.text_model.model.moe_layers()]

    async def drain(self, seconds: float) -> None:
        """Accepts nothing new, lets the answers in progress finish for so long, then ends them."""
        self._draining = True
        log.info("stopping", extra={"fields": {"drain_seconds": seconds}})
        if self._loaded is not None:
            if self._loaded.template is not None:
                self._loaded.template.close()  # a request that is not accepted yet will not be
            await self._loaded.engine.drain(seconds)

    def abort(self) -> None:
        """Ends the answers in progress."""
        if self._loaded is not None:
            self._loaded.engine.close()

    @property
    def context_length(self) -> int | None:
        """How many tokens a prompt and its answer may have together; None as long as there is no model."""
        return None if self._loaded is None else self._loaded.text_model.positions

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for another model than the one that is served; no name, or an empty one, is that one's."""
        if name and name not in self.names:
            raise ApiError(
                404, f"there is no model {name[:80]!r} here: this server has {' or '.join(self.names)}", "model"
            )

    def check_accepting(self) -> None:
        """ApiError 503 while the server is stopping."""
        if self._draining:
            raise ApiError(503, "the server is shutting down: ask again when it is back", retry_after=RETRY_SECONDS)

    async def submit(
        self, requests: Sequence[Request], param_names: Mapping[str, str]
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Submits all requests to the engine and returns an iterator of their events, each with its request's index;
        closing it cancels what is not finished. If the engine rejects one, none runs, and ApiError names the body's
        parameter: `param_names` maps the fields of a Request to them."""
        self.check_accepting()
        arrival = ARRIVAL_TIME.get(time.monotonic())
        streams: list[AsyncEvents] = []
        try:
            for request in requests:
                streams.append(await self.loaded.engine.submit(request))
        except BaseException as error:
            for stream in streams:
                stream.close()
            if isinstance(error, SoliError):
                raise self._rejection(error, param_names) from error
            raise
        return self.metrics.timed(merge_events(streams, self.limits.seconds), len(requests), arrival)

    def _rejection(self, error: SoliError, param_names: Mapping[str, str]) -> ApiError:
        """The answer to a request that the engine does not accept."""
        if isinstance(error, QueueFull):
            self.metrics.queue_full.inc()
            return ApiError(429, str(error), code="queue_full", retry_after=RETRY_SECONDS)
        if not self.ready:  # it began to stop meanwhile
            return ApiError(503, str(error), retry_after=RETRY_SECONDS)
        field = error.field if isinstance(error, RejectedRequest) else "constraint"
        too_long = isinstance(error, RejectedRequest) and error.too_long
        return ApiError(400, str(error), param_names.get(field), "context_length_exceeded" if too_long else None)


async def merge_events(streams: Sequence[AsyncEvents], seconds: float) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all streams as they come, each with its stream's index. All streams are closed at the end, also
    when the caller leaves early, after an error of one of them, and after so many seconds (ApiError 504)."""
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncEvents) -> None:
        try:
            async for event in stream:
                queue.put_nowait((index, event))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    deadline = asyncio.get_running_loop().time() + seconds
    unfinished = len(streams)
    try:
        while unfinished:
            async with asyncio.timeout_at(deadline):
                index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            unfinished -= event.finish_reason is not None
            yield index, event
    except TimeoutError:
        raise ApiError(504, f"the answer took longer than {seconds:g} seconds: ask for fewer tokens") from None
    finally:
        for task, stream in zip(tasks, streams, strict=True):
            task.cancel()
            stream.close()
