"""Many concurrent requests, a third of them cancelled at random: answers are batch-invariant and nothing leaks."""

import asyncio
import gc
import random

import httpx
import pytest

from soli.engine.async_engine import AsyncEngine
from soli.engine.engine import Engine
from soli.engine.request import EngineLimits
from tests.serve.tiny_server import serving, tiny

PROMPTS = ["the cat sat on the mat", "hello world", "你好世界", "今天天气很好", "the cat sat on the", "mat"]
LIMITS = EngineLimits(cache_bytes=18 * 2**10, block_size=4, max_running=8, max_waiting=64, tokens_per_step=32)


def bodies(count: int) -> list[dict]:
    """Requests of all kinds, the same for the same count."""
    generator = random.Random(0)
    result: list[dict] = []
    for _ in range(count):
        body = {"prompt": generator.choice(PROMPTS), "max_tokens": generator.choice([1, 5, 17, 30])}
        body |= generator.choice([{"temperature": 0}, {"temperature": 1.0, "seed": generator.randrange(4)}])
        masked = {"soli": {"masked_experts": [[1, 3]]}}
        body |= generator.choice([{}, {"stop": "a"}, {"logprobs": 2}, masked, {"presence_penalty": 1}])
        result.append(body | {"stream": generator.random() < 0.5})
    return result


async def streamed(client: httpx.AsyncClient, body: dict, leave_after: int | None) -> str | None:
    """The text of a stream; None for one left after so many lines."""
    import json

    text = ""
    lines = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            lines += 1
            if leave_after is not None and lines > leave_after:
                return None
            if line.startswith("data: {"):
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    return text


async def send(client: httpx.AsyncClient, body: dict, leave: random.Random | None) -> str | None:
    """One answer's text; with `leave`, one time out of three, None for a request that was given up."""
    gives_up = leave is not None and leave.random() < 1 / 3
    if body["stream"]:
        return await streamed(client, body, leave.randrange(6) if leave is not None and gives_up else None)
    request = asyncio.ensure_future(client.post("/v1/completions", json=body))
    if leave is not None and gives_up:
        await asyncio.sleep(leave.random() * 0.05)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        return None
    answer = await request
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


async def soak(url: str, requests: list[dict], concurrency: int, leave: random.Random | None) -> list[str | None]:
    slots = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def limited(body: dict) -> str | None:
            async with slots:
                return await send(client, body, leave)

        return await asyncio.gather(*map(limited, requests))


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def run(count: int) -> None:
    requests = bodies(count)
    engine = AsyncEngine(Engine(tiny(), LIMITS))
    with serving(engine) as url:
        kinds = {str(body): body for body in requests}
        alone = dict(zip(kinds, asyncio.run(soak(url, list(kinds.values()), 1, None)), strict=True))
        asyncio.run(soak(url, requests[: count // 4], 24, random.Random(1)))
        gc.collect()
        before = resident_bytes()
        answers = asyncio.run(soak(url, requests, 24, random.Random(2)))
        stats = engine.stats()
        while stats.running or stats.waiting:
            stats = engine.stats()
        gc.collect()
        growth = resident_bytes() - before
    engine.close()
    pairs = [(answer, alone[str(body)]) for answer, body in zip(answers, requests, strict=True) if answer is not None]
    assert count / 2 < len(pairs) < count
    assert [answer for answer, _ in pairs] == [lone for _, lone in pairs]
    assert stats.blocks_used == 0 and stats.preemptions > 0 and stats.prefix_hit_tokens > 0
    assert growth < 24 * 2**20, f"{growth / 2**20:.1f} MiB more than before"


def test_answers_to_sixty_requests_are_batch_invariant():
    run(60)


@pytest.mark.slow
def test_answers_to_two_thousand_requests_are_batch_invariant_in_flat_memory():
    run(2000)
