"""Several event streams as one, for answers with several choices, bounded in time."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from soli.engine.async_engine import AsyncEvents
from soli.engine.request import Event
from soli.serve.errors import ApiError


async def merged(streams: Sequence[AsyncEvents], seconds: float) -> AsyncGenerator[tuple[int, Event], None]:
    """Events as they come, each with its stream's place. Left early, or after so long (ApiError 504), all close."""
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def pump(place: int, stream: AsyncEvents) -> None:
        async for event in stream:
            queue.put_nowait((place, event))

    tasks = [asyncio.create_task(pump(place, stream)) for place, stream in enumerate(streams)]
    deadline = asyncio.get_running_loop().time() + seconds
    left = len(streams)
    try:
        while left:
            async with asyncio.timeout_at(deadline):
                place, event = await queue.get()
            left -= event.finish_reason is not None
            yield place, event
    except TimeoutError:
        raise ApiError(504, f"the answer took longer than {seconds:g} seconds: ask for fewer tokens") from None
    finally:
        for task, stream in zip(tasks, streams, strict=True):
            task.cancel()
            stream.close()
