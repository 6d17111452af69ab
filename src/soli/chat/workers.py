"""Processes that render one chat template (soli/chat/sandbox.py), kept warm, replaced when one exceeds its limits.

A process is started when all others are busy, up to MAX_PROCESSES. It gets no environment of this one's, where an API
key may be. A frame that is not answered in time ends its process; so does `close`, also while frames are computed.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from soli.chat.sandbox import CPU_SECONDS, read_frame, write_frame
from soli.errors import SoliError

MAX_PROCESSES = 4
SECONDS = 5.0  # for one frame, waiting for the CPU included
START_SECONDS = 30.0  # for the interpreter and the template
MAX_REPLY = 256 * 2**20  # bytes
ENVIRONMENT = ("LD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT", "TZ")

OVER_TIME = f"takes more than {CPU_SECONDS} seconds"
OVER_MEMORY = "takes more memory than a prompt may"
CLOSED = "was stopped: the server is shutting down"


class RenderFailure(SoliError):
    """A frame without a result. `kind`: "template" for an error in the template, the name of an argument that the
    template has no use for, "limit" for time or memory, "closed" after `close`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class RenderWorkers:
    """`template` is the first frame of every process. Thread-safe."""

    def __init__(self, template: Mapping[str, Any]) -> None:
        self._template = json.dumps(template).encode()
        self._slots = threading.BoundedSemaphore(MAX_PROCESSES)
        self._lock = threading.Lock()
        self._idle: list[_RenderingProcess] = []
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._closed = threading.Event()
        self._finalizer = weakref.finalize(self, _end_all, self._processes, self._lock, self._closed)

    def start(self) -> dict[str, Any]:
        """Starts a process; its answer to the template."""
        worker, reply = self._new_worker()
        self._put_back(worker)
        return reply

    def render(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one frame; RenderFailure without one."""
        try:
            frame = json.dumps(request, ensure_ascii=False).encode()
        except ValueError as error:  # lone surrogates, integers of thousands of digits
            raise RenderFailure("template", f"not JSON: {error}") from error
        with self._slots:
            worker = self._take()
            try:
                reply = worker.answer(frame, SECONDS)
            except BaseException as error:
                self._discard(worker)
                if isinstance(error, RenderFailure) and self._closed.is_set():
                    raise RenderFailure("closed", CLOSED) from error
                raise
            self._put_back(worker)
        if "failure" in reply:
            raise RenderFailure(reply["failure"], reply["reason"])
        return reply

    def close(self) -> None:
        """Ends all processes; what they compute fails."""
        self._finalizer()

    def _take(self) -> "_RenderingProcess":
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return self._new_worker()[0]
            if worker.process.poll() is None:
                return worker
            self._discard(worker)

    def _put_back(self, worker: "_RenderingProcess") -> None:
        with self._lock:
            self._idle.append(worker)

    def _discard(self, worker: "_RenderingProcess") -> None:
        worker.end()
        with self._lock:
            self._processes.discard(worker.process)

    def _new_worker(self) -> tuple["_RenderingProcess", dict[str, Any]]:
        with self._lock:
            if self._closed.is_set():
                raise RenderFailure("closed", CLOSED)
            worker = _RenderingProcess()
            self._processes.add(worker.process)
        try:
            reply = worker.answer(self._template, START_SECONDS)
            if "failure" in reply:
                raise RenderFailure(reply["failure"], reply["reason"])
        except BaseException:
            self._discard(worker)
            raise
        return worker, reply


class _RenderingProcess:
    """One process."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        package_root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join([package_root, *map(os.path.abspath, sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "soli.chat.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def answer(self, frame: bytes, seconds: float) -> dict[str, Any]:
        """The answer to a frame; RenderFailure when the process exceeded a limit or ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        timed_out = threading.Event()

        def end_late() -> None:
            timed_out.set()
            self.process.kill()

        timer = threading.Timer(seconds, end_late)
        timer.daemon = True
        timer.start()
        try:
            write_frame(self.process.stdin, frame)
            reply = read_frame(self.process.stdout, MAX_REPLY)
        except OSError:  # the process ended before it had read the frame
            reply = None
        finally:
            timer.cancel()
        content: dict[str, Any] = {"failure": "memory"} if reply is None else json.loads(reply)
        if reply is None:
            self.end()
        over_time = timed_out.is_set() or self.process.returncode == -signal.SIGXCPU
        if content.get("failure") == "memory":
            raise RenderFailure("limit", OVER_TIME if over_time else OVER_MEMORY)
        return content

    def end(self) -> None:
        """Ends the process, which nothing uses any more."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # bytes that the process did not read
                    pipe.close()


def _end_all(processes: set[subprocess.Popen[bytes]], lock: threading.Lock, closed: threading.Event) -> None:
    with lock:
        closed.set()
        for process in processes:
            process.kill()
