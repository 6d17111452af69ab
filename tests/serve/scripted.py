"""An engine that answers with scripted texts: AsyncEngine's interface without a model."""

import asyncio
from collections.abc import AsyncIterator, Callable

from soli.engine.detokenizer import TextStream, token_text
from soli.engine.request import EngineStats, Event, QueueFull, Request, Usage
from soli.engine.sampler import TokenLogprob
from soli.engine.text_model import TextModel
from soli.errors import SoliError

Script = Callable[[Request], str]


class ScriptedEngine:
    """`script` returns the whole text of an answer, emitted a token each `pause` seconds; a SoliError in it rejects the
    request, another exception ends the answer in the middle with "error"."""

    healthy = True

    def __init__(self, text_model: TextModel, script: Script, pause: float = 0.0, waiting: int = 1000) -> None:
        self.text_model = text_model
        self.script = script
        self.pause = pause
        self.queue_size = waiting
        self.requests: list[Request] = []
        self.running = 0
        self.cancelled = 0

    async def submit(self, request: Request) -> "ScriptedEvents":
        if self.running >= self.queue_size:
            raise QueueFull("1 requests wait already: try again later")
        self.requests.append(request)
        text, fails = self._run_script(request)
        self.running += 1
        return ScriptedEvents(self, request, text, fails)

    def _run_script(self, request: Request) -> tuple[str, bool]:
        """The text, and whether the answer fails behind it."""
        try:
            return self.script(request), False
        except SoliError:
            raise
        except Exception:
            return "half", True

    def stats(self) -> EngineStats:
        return EngineStats(self.running, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, ())

    async def drain(self, seconds: float) -> None:
        self.healthy = False
        deadline = asyncio.get_running_loop().time() + seconds
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)

    def close(self, seconds: float = 0.0) -> None:
        self.healthy = False


class ScriptedEvents:
    def __init__(self, engine: ScriptedEngine, request: Request, text: str, fails: bool) -> None:
        self._engine = engine
        self._open = True
        self._events = self._answer(request, text, fails)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await anext(self._events)
        if event.finish_reason is not None:
            self._end()
        return event

    def close(self) -> None:
        self._engine.cancelled += self._open
        self._end()

    async def aclose(self) -> None:
        self.close()

    def _end(self) -> None:
        self._engine.running -= self._open
        self._open = False

    async def _answer(self, request: Request, text: str, fails: bool) -> AsyncIterator[Event]:
        tokenizer = self._engine.text_model.tokenizer
        stream = TextStream(token_text(tokenizer, request.visible_ids), request.stop)
        emitted = 0
        prompt = len(request.prompt_ids)
        for token in tokenizer.encode_spelled(text):
            await asyncio.sleep(self._engine.pause)
            emitted += 1
            logprob = None if request.logprobs is None else TokenLogprob(token, -0.5, ((token, -0.5),))
            yield Event(0, token, stream.push(token), logprob)
            if stream.stopped or emitted == request.max_new_tokens:
                break
        if fails:
            yield Event(0, finish_reason="error", error="the step failed", usage=Usage(prompt, emitted))
            return
        reason = "length" if emitted == request.max_new_tokens and not stream.stopped else "stop"
        text, usage = stream.finish(), Usage(prompt, emitted)
        yield Event(0, None, text, stop_string=stream.stop_string, finish_reason=reason, usage=usage)
