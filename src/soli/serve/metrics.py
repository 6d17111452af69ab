"""What Prometheus reads at /metrics: the engine's figures when it asks, and how long callers waited for tokens."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from soli.engine.request import Event

if TYPE_CHECKING:
    from soli.serve.service import Service

FIRST = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
BETWEEN = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
GAUGES = {
    "running": "Requests that are being answered",
    "waiting": "Requests that wait for a place",
    "pages_used": "Blocks of the latent cache that belong to a request",
    "pages_total": "Blocks of the latent cache",
    "cache_bytes": "Bytes of the latent cache that are allocated",
}
FIELDS = {"pages_used": "blocks_used", "pages_total": "blocks_total"}  # of EngineStats, where named otherwise
COUNTERS = {
    "steps": "Passes of the model",
    "prompt_tokens": "Prompt tokens read",
    "completion_tokens": "Tokens written",
    "prefix_hit_tokens": "Prompt tokens found in the cache",
    "preemptions": "Requests that gave their pages back and were read again",
    "drafted": "Tokens drafted by MTP",
    "accepted": "Drafted tokens that were accepted",
}


class Metrics:
    """One registry per server; the engine's figures are read when it is scraped."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._service = service
        self.first = Histogram(
            "soli_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            buckets=FIRST,
            registry=self._registry,
        )
        self.between = Histogram(
            "soli_inter_token_seconds", "Between two tokens of an answer", buckets=BETWEEN, registry=self._registry
        )
        self.ended = Counter("soli_requests", "Answers that ended", ["reason"], registry=self._registry)
        self.refused = Counter("soli_queue_full", "Requests refused because too many wait", registry=self._registry)
        self._registry.register(_EngineFigures(service))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)

    async def timed(
        self, events: AsyncGenerator[tuple[int, Event], None], requests: int, arrived: float
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of so many requests themselves, their times taken, from `arrived` on (time.monotonic()); who is
        left without an end was cancelled."""
        last: dict[int, float] = {}
        left = requests
        try:
            async with aclosing(events):
                async for place, event in events:
                    now = time.monotonic()
                    if event.token is not None:
                        if place in last:
                            self.between.observe(now - last[place])
                        else:
                            self.first.observe(now - arrived)
                        last[place] = now
                    if event.finish_reason is not None:
                        left -= 1
                        self.ended.labels(event.finish_reason).inc()
                    yield place, event
        finally:
            self.ended.labels("cancelled").inc(left)


class _EngineFigures:
    """A collector, as prometheus_client calls it."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("soli_ready", "Whether requests are answered", value=float(self._service.ready))
        loaded = self._service.loaded_or_none
        if loaded is None:
            return
        stats = loaded.engine.stats()
        for name, said in GAUGES.items():
            yield GaugeMetricFamily(f"soli_{name}", said, value=getattr(stats, FIELDS.get(name, name)))
        for name, said in COUNTERS.items():
            yield CounterMetricFamily(f"soli_{name}", said, value=getattr(stats, name))
        load = CounterMetricFamily("soli_expert_load", "How often an expert was chosen", labels=["layer", "expert"])
        names = [name for name, _ in loaded.text_model.model.moe_layers()]
        for name, counts in zip(names, stats.expert_load, strict=False):
            for expert, count in enumerate(counts):
                load.add_metric([name, str(expert)], count)
        yield load
