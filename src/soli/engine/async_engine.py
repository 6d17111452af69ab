"""An engine on a thread of its own, for event loops and threads that wait for many answers at once.

Callers submit requests and iterate over their events; the thread is the only one that touches the engine. It starts
with the first request, sleeps while there is nothing to do, and ends with `drain` or `close`, with the process, or when
nothing references the AsyncEngine any more. Requests that come later are rejected.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

from soli.engine.engine import Engine
from soli.engine.request import EngineStats, Event, Request
from soli.errors import SoliError

log = logging.getLogger(__name__)

SHUTTING_DOWN = "the engine is shutting down: ask again when it is back"
INCOMPLETE = "the engine was shut down before the answer was complete: ask again when it is back"
FAILED = "the engine stopped after an error that was no request's: start it again"


class AsyncEngine:
    """Runs `engine`, which nothing else may use from now on. Every method may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self.worker = _Worker(engine)
        weakref.finalize(self, self.worker.end, 0.0)  # at exit, too

    async def submit(self, request: Request) -> AsyncEvents:
        """Submit a request; its events, as they come. Errors of `Engine.add` (QueueFull) are raised here, before any
        event. A constraint is compiled first, in a thread of its own: no other answer waits for it."""
        if request.constraint is not None:
            await asyncio.to_thread(self.worker.engine.prepare, request)
        events = AsyncEvents(self, _Submission(request, asyncio.Queue(), asyncio.get_running_loop()))
        await asyncio.shield(asyncio.wrap_future(events.submission.request_id))  # if this is cancelled, so is `events`
        return events

    def open(self, request: Request) -> Events:
        """`submit` for a thread, without waiting: what it would raise, the first event raises."""
        return Events(self, _Submission(request, SimpleQueue()))

    def stats(self) -> EngineStats:
        """The engine's metrics; while a step runs, some may be those before it."""
        return self.worker.engine.stats()

    @property
    def healthy(self) -> bool:
        """Whether requests are accepted: not after `drain` or `close`, nor after an error that was no request's."""
        return self.worker.rejection is None

    async def drain(self, seconds: float) -> None:
        """Accept no more requests, let the running ones finish for so long, cancel the rest and end the thread."""
        await asyncio.to_thread(self.close, seconds)

    def close(self, seconds: float = 0.0) -> None:
        """`drain` for a thread."""
        self.worker.end(seconds)


@dataclass(eq=False)
class _Submission:
    """A submitted request, and the queue of its events."""

    request: Request
    queue: asyncio.Queue[Event] | SimpleQueue[Event]
    loop: asyncio.AbstractEventLoop | None = None  # the one to wake, for an asyncio.Queue
    request_id: Future[int] = field(default_factory=Future)


class _EventIterator:
    """One request's events. Closed or dropped before the last, it cancels the request, which ends within one step."""

    def __init__(self, engine: AsyncEngine, submission: _Submission) -> None:
        self.submission, self._engine, self._ended = submission, engine, True
        engine.worker.submit(submission)
        self._ended = False

    def close(self) -> None:
        """Cancel the rest."""
        if not self._ended:
            self._ended = True
            self._engine.worker.drop(self.submission)

    def __del__(self) -> None:
        self.close()

    def _note_end(self, event: Event) -> Event:
        self._ended = event.finish_reason is not None
        return event


class Events(_EventIterator, Iterator[Event]):
    """An iterator; each event waits for its step."""

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        self.submission.request_id.result()
        assert isinstance(self.submission.queue, SimpleQueue)
        return self._note_end(self.submission.queue.get())


class AsyncEvents(_EventIterator, AsyncIterator[Event]):
    """An asynchronous iterator, for the event loop that submitted the request."""

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        assert isinstance(self.submission.queue, asyncio.Queue)
        return self._note_end(await self.submission.queue.get())

    async def aclose(self) -> None:
        self.close()


class _Worker:
    """The thread, its queue of actions, and the submissions under way. It has no reference to its AsyncEngine, so that
    the latter can be collected."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rejection: str | None = None  # why no more requests are accepted
        self._wake = threading.Condition()  # re-entrant: the garbage collector may call `drop` while it is held
        self._actions: deque[Callable[[], None]] = deque()
        self._submissions: dict[int, _Submission] = {}  # by request id; of the thread alone
        self._thread: threading.Thread | None = None
        self._deadline = math.inf

    def submit(self, submission: _Submission) -> None:
        with self._wake:
            if self.rejection is not None:
                raise SoliError(self.rejection)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="soli-engine", daemon=True)
                self._thread.start()
            self._enqueue(lambda: self._admit(submission))

    def drop(self, submission: _Submission) -> None:
        self._enqueue(lambda: self._cancel(submission))

    def end(self, seconds: float) -> None:
        with self._wake:
            self.rejection = self.rejection or SHUTTING_DOWN
            self._deadline = time.monotonic() + seconds
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _enqueue(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._actions.append(action)
            self._wake.notify()

    def _run(self) -> None:
        error = INCOMPLETE
        try:
            while self._wait_for_work():
                while self._actions:
                    self._actions.popleft()()
                if self.engine.has_work:
                    self._deliver(self.engine.step())
        except Exception:
            log.exception("the engine stopped")
            self.rejection = error = FAILED
        self._finish(error)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False when it is time to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._actions or self.engine.has_work or self._deadline < math.inf)
        if self._deadline == math.inf or self._actions:
            return True
        return self.engine.has_work and time.monotonic() < self._deadline

    def _admit(self, submission: _Submission) -> None:
        try:
            request_id = self.engine.add(submission.request)
        except Exception as error:
            submission.request_id.set_exception(error)
        else:
            self._submissions[request_id] = submission
            submission.request_id.set_result(request_id)

    def _cancel(self, submission: _Submission) -> None:
        accepted = submission.request_id.exception() is None  # the request came before, so this is set
        if accepted and self._submissions.pop(submission.request_id.result(), None) is not None:
            self.engine.cancel(submission.request_id.result())

    def _deliver(self, events: Sequence[Event]) -> None:
        """Put one step's events into their queues; an event loop is woken once for all of its own."""
        by_loop: dict[asyncio.AbstractEventLoop | None, list[tuple[_Submission, Event]]] = {}
        for event in events:
            submission = self._submissions.get(event.request_id)
            if submission is not None:
                by_loop.setdefault(submission.loop, []).append((submission, event))
            if event.finish_reason is not None:
                self._submissions.pop(event.request_id, None)
        for loop, pairs in by_loop.items():
            if loop is None:
                _put(pairs)
                continue
            try:
                loop.call_soon_threadsafe(_put, pairs)
            except RuntimeError:  # the loop was closed before its requests ended
                for submission, _ in pairs:
                    self._cancel(submission)

    def _finish(self, error: str) -> None:
        """End every submission with `error`, and every request of the engine."""
        with self._wake:
            while self._actions:
                self._actions.popleft()()
        unfinished = list(self._submissions)
        self._deliver([Event(request_id, finish_reason="error", error=error) for request_id in unfinished])
        for request_id in unfinished:
            self.engine.cancel(request_id)


def _put(pairs: Sequence[tuple[_Submission, Event]]) -> None:
    for submission, event in pairs:
        submission.queue.put_nowait(event)
