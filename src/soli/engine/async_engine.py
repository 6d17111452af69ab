"""An engine on a thread of its own, for event loops and threads that wait for many answers at once.

Whoever asks hands a request over and reads its events as they come; the thread is the only one that touches the engine.
It starts with the first request, sleeps while there is nothing to do, and ends with `drain` or `close`, with the
process, or when nobody holds the AsyncEngine any more. Refuses requests once it was told to end.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

from soli.engine.engine import Engine
from soli.engine.request import EngineStats, Event, Request
from soli.errors import SoliError

log = logging.getLogger(__name__)

ENDING = "the engine is shutting down: ask again when it is back"
CUT_OFF = "the engine was shut down before the answer was complete: ask again when it is back"
BROKEN = "the engine stopped after an error that was no request's: start it again"


class AsyncEngine:
    """Runs `engine`, which nobody else may use from now on. Every method may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self.worker = _Worker(engine)
        weakref.finalize(self, self.worker.end, 0.0)  # at exit, too

    async def submit(self, request: Request) -> AsyncEvents:
        """Hands a request over; its events as they come. Errors of `Engine.add` (QueueFull) are raised here, before any
        event."""
        events = AsyncEvents(self, _Ticket(request, asyncio.Queue(), asyncio.get_running_loop()))
        await asyncio.shield(asyncio.wrap_future(events.ticket.admitted))  # cancelled here, `events` is dropped
        return events

    def open(self, request: Request) -> Events:
        """`submit` for a thread, without waiting: what it would raise, the first event raises."""
        return Events(self, _Ticket(request, SimpleQueue()))

    def stats(self) -> EngineStats:
        """The engine's figures; while a step runs, some may be those before it."""
        return self.worker.engine.stats()

    @property
    def healthy(self) -> bool:
        """Whether requests are taken: not once it was told to end, nor after an error that was no request's."""
        return self.worker.refusal is None

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, lets those at hand finish for so long, cancels the rest and ends the thread."""
        await asyncio.to_thread(self.close, seconds)

    def close(self, seconds: float = 0.0) -> None:
        """`drain` for a thread."""
        self.worker.end(seconds)


@dataclass(eq=False)
class _Ticket:
    """A request that was handed over, and where its events go."""

    request: Request
    queue: asyncio.Queue[Event] | SimpleQueue[Event]
    loop: asyncio.AbstractEventLoop | None = None  # the one to wake, for an asyncio.Queue
    admitted: Future[int] = field(default_factory=Future)  # its number


class _Answer:
    """One request's events. Closed or dropped before the last, it cancels the request, which ends within one step."""

    def __init__(self, engine: AsyncEngine, ticket: _Ticket) -> None:
        self.ticket, self._engine, self._ended = ticket, engine, True
        engine.worker.take(ticket)
        self._ended = False

    def close(self) -> None:
        """Nobody wants the rest."""
        if not self._ended:
            self._ended = True
            self._engine.worker.drop(self.ticket)

    def __del__(self) -> None:
        self.close()

    def _read(self, event: Event) -> Event:
        self._ended = event.finish_reason is not None
        return event


class Events(_Answer):
    """An iterator; each event waits for the step that brings it."""

    def __iter__(self) -> Events:
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        self.ticket.admitted.result()
        assert isinstance(self.ticket.queue, SimpleQueue)
        return self._read(self.ticket.queue.get())


class AsyncEvents(_Answer):
    """An asynchronous iterator, for the event loop that submitted the request."""

    def __aiter__(self) -> AsyncEvents:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        assert isinstance(self.ticket.queue, asyncio.Queue)
        return self._read(await self.ticket.queue.get())

    async def aclose(self) -> None:
        self.close()


class _Worker:
    """The thread, what is asked of it, and who waits for what. AsyncEngine, which it does not know, can be dropped."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.refusal: str | None = None  # why nothing is taken any more
        self._wake = threading.Condition()  # re-entrant: `drop` may come from the collector while it is held
        self._asked: deque[Callable[[], None]] = deque()
        self._tickets: dict[int, _Ticket] = {}  # by the request's number; the thread's alone
        self._thread: threading.Thread | None = None
        self._deadline = math.inf

    def take(self, ticket: _Ticket) -> None:
        with self._wake:
            if self.refusal is not None:
                raise SoliError(self.refusal)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="soli-engine", daemon=True)
                self._thread.start()
            self._ask(lambda: self._admit(ticket))

    def drop(self, ticket: _Ticket) -> None:
        self._ask(lambda: self._cancel(ticket))

    def end(self, seconds: float) -> None:
        with self._wake:
            self.refusal = self.refusal or ENDING
            self._deadline = time.monotonic() + seconds
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _ask(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._asked.append(action)
            self._wake.notify()

    def _run(self) -> None:
        error = CUT_OFF
        try:
            while self._awaited():
                while self._asked:
                    self._asked.popleft()()
                if self.engine.has_work:
                    self._deliver(self.engine.step())
        except Exception:
            log.exception("the engine stopped")
            self.refusal = error = BROKEN
        self._finish(error)

    def _awaited(self) -> bool:
        """Waits until there is something to do; False when it is time to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._asked or self.engine.has_work or self._deadline < math.inf)
        if self._deadline == math.inf or self._asked:
            return True
        return self.engine.has_work and time.monotonic() < self._deadline

    def _admit(self, ticket: _Ticket) -> None:
        try:
            number = self.engine.add(ticket.request)
        except Exception as error:
            ticket.admitted.set_exception(error)
        else:
            self._tickets[number] = ticket
            ticket.admitted.set_result(number)

    def _cancel(self, ticket: _Ticket) -> None:
        admitted = ticket.admitted.exception() is None  # asked for after the request, so this is known
        if admitted and self._tickets.pop(ticket.admitted.result(), None) is not None:
            self.engine.cancel(ticket.admitted.result())

    def _deliver(self, events: Sequence[Event]) -> None:
        """Hands out one step's events; an event loop is woken once for all of its own."""
        by_loop: dict[asyncio.AbstractEventLoop | None, list[tuple[_Ticket, Event]]] = {}
        for event in events:
            ticket = self._tickets.get(event.request)
            if ticket is not None:
                by_loop.setdefault(ticket.loop, []).append((ticket, event))
            if event.finish_reason is not None:
                self._tickets.pop(event.request, None)
        for loop, pairs in by_loop.items():
            if loop is None:
                _put(pairs)
                continue
            try:
                loop.call_soon_threadsafe(_put, pairs)
            except RuntimeError:  # the loop was closed over its requests
                for ticket, _ in pairs:
                    self._cancel(ticket)

    def _finish(self, error: str) -> None:
        """The end: whoever still waits is told so, and the engine lets go of everything."""
        with self._wake:
            while self._asked:
                self._asked.popleft()()
        left = list(self._tickets)
        self._deliver([Event(number, finish_reason="error", error=error) for number in left])
        for number in left:
            self.engine.cancel(number)


def _put(pairs: Sequence[tuple[_Ticket, Event]]) -> None:
    for ticket, event in pairs:
        ticket.queue.put_nowait(event)
