"""What the server counts: Prometheus's /metrics, and which tokens each expert was selected for.

The engine's statistics are read when /metrics is scraped. Expert statistics cover the tokens whose routing a request
asked for: per expert how often it was selected, for which kinds of tokens, and the tokens of highest weight with some
of the text around them. Their memory is bounded: counts and MAX_TOKENS tokens per expert.
"""

import heapq
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from soli.analysis.trace import TokenTrace
from soli.data.text import count_han
from soli.engine.request import EngineStats, Event
from soli.serve.protocol_responses import ExpertReport, ExpertToken

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

MAX_TOKENS = 32  # kept per expert
CONTEXT_TOKENS = 3  # shown on each side of a token
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
        load = CounterMetricFamily("soli_expert_load", "How often an expert was selected", labels=["layer", "expert"])
        for layer, counts in zip(layers, stats.expert_load, strict=False):
            for expert, count in enumerate(counts):
                load.add_metric([layer, str(expert)], count)
        yield load


Excerpt = tuple[str, str, str]  # the text before a token, the token, the text after it


@dataclass
class _ExpertUse:
    kinds: Counter[str] = field(default_factory=Counter)
    top: list[tuple[float, int, Excerpt]] = field(default_factory=list)  # a heap, lowest weight first

    def add(self, weight: float, number: int, excerpt: Excerpt, kind: str) -> None:
        """Counts token `number`, of which every entry of the heap has another."""
        self.kinds[kind] += 1
        push = heapq.heappush if len(self.top) < MAX_TOKENS else heapq.heappushpop
        push(self.top, (weight, number, excerpt))


class ExpertStatistics:
    """Which tokens each expert was selected for since the server started. Thread-safe."""

    def __init__(self) -> None:
        self._uses: dict[tuple[str, int], _ExpertUse] = {}
        self._tokens_read = 0
        self._lock = threading.Lock()

    def add(self, traces: Sequence[TokenTrace], texts: Sequence[str]) -> None:
        """Adds tokens that were read; `texts` are all tokens of their text, by position."""
        with self._lock:
            for trace in traces:
                self._tokens_read += 1
                self._add_token(trace, texts)

    def report(self, layer: str, expert: int, limit: int) -> ExpertReport:
        """One expert with up to `limit` tokens, highest weight first."""
        with self._lock:
            use = self._uses.get((layer, expert), _ExpertUse())
            top = sorted(use.top, reverse=True)[:limit]
            selected = use.kinds.total()
            return ExpertReport(
                layer=layer,
                expert=expert,
                selected=selected,
                tokens_read=self._tokens_read,
                plays=selected,
                read=self._tokens_read,
                tokens=[
                    ExpertToken(text=text, weight=weight, before=before, after=after)
                    for weight, _, (before, text, after) in top
                ],
                kinds={kind: use.kinds[kind] for kind in KINDS},
            )

    def _add_token(self, trace: TokenTrace, texts: Sequence[str]) -> None:
        at = trace.position
        before = "".join(texts[max(0, at - CONTEXT_TOKENS) : at])
        after = "".join(texts[at + 1 : at + 1 + CONTEXT_TOKENS])
        kind = kind_of(trace.text)
        for layer in trace.layers:
            for expert in layer.selected:
                use = self._uses.setdefault((layer.layer, expert.expert), _ExpertUse())
                use.add(expert.weight, self._tokens_read, (before, trace.text, after), kind)


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
