"""What the server counts: Prometheus's /metrics, and which tokens each expert was selected for.

The engine's statistics are read when /metrics is scraped. Expert statistics cover the tokens whose routing a request
asked for: per expert how often it was selected, and for which kinds of tokens. They are counts alone: a server has many
callers, and no caller may read from it what another one wrote.
"""

import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from soli.analysis.trace import TokenTrace
from soli.data.text import count_han
from soli.engine.request import EngineStats, Event
from soli.serve.protocol_responses import ExpertReport

FIRST_TOKEN_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
INTER_TOKEN_BUCKETS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
GAUGES = {  # metric: (field of EngineStats, help)
    "running": ("running", "Requests that are being answered"),
    "waiting": ("waiting", "Requests in the queue"),
    "kv_blocks_used": ("blocks_used", "Blocks of the latent cache that belong to a request"),
    "kv_blocks_total": ("blocks_total", "Blocks of the latent cache"),
    "pages_used": ("blocks_used", "The old name of soli_kv_blocks_used"),
    "pages_total": ("blocks_total", "The old name of soli_kv_blocks_total"),
    "cache_bytes": ("cache_bytes", "Bytes of the latent cache that are allocated"),
}
COUNTERS = {  # field of EngineStats: help
    "steps": "Forward passes of the model",
    "prompt_tokens": "Prompt tokens computed",
    "completion_tokens": "Tokens generated",
    "prefix_hit_tokens": "Prompt tokens found in the cache",
    "preemptions": "Requests that gave up their blocks and were computed again",
    "drafted": "Tokens drafted by MTP",
    "accepted": "Drafted tokens that were accepted",
}
PAGING_COUNTERS = {  # metric: (field of PagingStats, help)
    "expert_cache_hits": ("hits", "Experts that were in memory when a layer chose them"),
    "expert_cache_misses": ("misses", "Experts that were read from disk when a layer chose them"),
    "expert_read_bytes": ("bytes_read", "Bytes of experts read from disk, ahead and in vain too"),
    "expert_read_seconds": ("read_seconds", "Seconds in which experts were being read from disk"),
    "expert_wait_seconds": ("waited_seconds", "Seconds that forward passes waited for experts"),
    "weight_bytes": ("bytes_used", "Bytes of weights that forward passes read from memory"),
    "step_seconds": ("step_seconds", "Seconds of forward passes"),
}
PAGING_GAUGES = {  # those that are known
    "disk_bytes_per_second": ("disk_rate", "What the disk was measured to read"),
    "memory_bytes_per_second": ("memory_rate", "What the memory was measured to read"),
    "disk_bandwidth_share": ("disk_share", "Read from disk while forward passes ran, of what it can"),
    "memory_bandwidth_share": ("memory_share", "Read from memory while forward passes ran, of what it can"),
}

KINDS = ("chinese", "english", "digits", "punctuation", "other")


class ServerMetrics:
    """One registry per server, and the collector of the engine's statistics in it.

    `engine_stats` returns them with the names of the model's MoE layers; None without a model.
    """

    def __init__(
        self, is_ready: Callable[[], bool], engine_stats: Callable[[], tuple[EngineStats, Sequence[str]] | None]
    ) -> None:
        self._is_ready = is_ready
        self._engine_stats = engine_stats
        self._registry = prometheus.CollectorRegistry()
        self.first_token = prometheus.Histogram(
            "soli_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self.inter_token = prometheus.Histogram(
            "soli_inter_token_seconds",
            "Between two tokens of an answer",
            buckets=INTER_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self.finished = prometheus.Counter("soli_requests", "Answers that ended", ["reason"], registry=self._registry)
        self.queue_full = prometheus.Counter(
            "soli_queue_full", "Requests rejected because the queue is full", registry=self._registry
        )
        self._registry.register(self)

    def text(self) -> bytes:
        """The page that Prometheus scrapes."""
        return prometheus.generate_latest(self._registry)

    async def timed(
        self, events: AsyncGenerator[tuple[int, Event], None], requests: int, arrival: float
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of so many requests, unchanged, while their times since `arrival` (time.monotonic()) are observed;
        a request without a last event was cancelled."""
        last_times: dict[int, float] = {}
        unfinished = requests
        try:
            async with aclosing(events):
                async for index, event in events:
                    if event.token is not None:
                        self._observe(last_times, index, arrival)
                    if event.finish_reason is not None:
                        unfinished -= 1
                        self.finished.labels(event.finish_reason).inc()
                    yield index, event
        finally:
            self.finished.labels("cancelled").inc(unfinished)

    def _observe(self, last_times: dict[int, float], index: int, arrival: float) -> None:
        now = time.monotonic()
        if index in last_times:
            self.inter_token.observe(now - last_times[index])
        else:
            self.first_token.observe(now - arrival)
        last_times[index] = now

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client calls when /metrics is scraped."""
        yield GaugeMetricFamily("soli_ready", "Whether requests are answered", value=float(self._is_ready()))
        stats_and_layers = self._engine_stats()
        if stats_and_layers is None:
            return
        stats, layers = stats_and_layers
        for name, (stat, description) in GAUGES.items():
            yield GaugeMetricFamily(f"soli_{name}", description, value=getattr(stats, stat))
        for name, description in COUNTERS.items():
            yield CounterMetricFamily(f"soli_{name}", description, value=getattr(stats, name))
        if stats.paging is not None:
            slots = stats.paging.slots
            yield GaugeMetricFamily("soli_expert_cache_slots", "Experts that fit in memory at once", value=slots)
            for name, (stat, description) in PAGING_COUNTERS.items():
                yield CounterMetricFamily(f"soli_{name}", description, value=getattr(stats.paging, stat))
            for name, (stat, description) in PAGING_GAUGES.items():
                if (value := getattr(stats.paging, stat)) is not None:
                    yield GaugeMetricFamily(f"soli_{name}", description, value=value)
        load = CounterMetricFamily("soli_expert_load", "How often an expert was selected", labels=["layer", "expert"])
        for layer, counts in zip(layers, stats.expert_load, strict=False):
            for expert, count in enumerate(counts):
                load.add_metric([layer, str(expert)], count)
        yield load


class ExpertStatistics:
    """For how many tokens of which kinds each expert was selected since the server started. Thread-safe."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, int], Counter[str]] = {}  # by layer and expert
        self._tokens_read = 0
        self._lock = threading.Lock()

    def add(self, traces: Sequence[TokenTrace]) -> None:
        """Counts tokens that were read."""
        with self._lock:
            for trace in traces:
                self._tokens_read += 1
                kind = kind_of(trace.text)
                for layer in trace.layers:
                    for expert in layer.selected:
                        self._kinds.setdefault((layer.layer, expert.expert), Counter())[kind] += 1

    def report(self, layer: str, expert: int) -> ExpertReport:
        """The counts of one expert."""
        with self._lock:
            kinds = self._kinds.get((layer, expert), Counter())
            selected = kinds.total()
            return ExpertReport(
                layer=layer,
                expert=expert,
                selected=selected,
                tokens_read=self._tokens_read,
                plays=selected,
                read=self._tokens_read,
                tokens=[],
                kinds={kind: kinds[kind] for kind in KINDS},
            )


def kind_of(text: str) -> str:
    """What a token mostly is: one of KINDS."""
    bare = text.strip()
    if count_han(bare):
        return "chinese"
    if any(character.isdigit() for character in bare):
        return "digits"
    if any(character.isascii() and character.isalpha() for character in bare):
        return "english" if not bare.startswith("<|") else "other"
    if bare and all(not character.isalnum() and character.isprintable() for character in bare) and "⟨" not in bare:
        return "punctuation"
    return "other"
