"""Prometheus metrics, in a registry of their own: what handlers saw, and the engine's counters when they are asked."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ziggurat.runtime.engine import Engine, EngineStats
from ziggurat.runtime.server.record import RequestRecord

#: The content type of ``Metrics.render``.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_S = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5)

# (field of EngineStats, name, what it says); counters get _total
_COUNTERS = (
    ("finished", "generations_finished", "Generations that ended by themselves or at their limit."),
    ("cancelled", "generations_cancelled", "Generations that were cancelled, by clients that left for example."),
    ("failed", "generations_failed", "Generations that ended with an error."),
    ("refused", "generations_refused", "Generations that were refused because the queue was full."),
    ("prompt_tokens", "prompt_tokens", "Tokens of prompts, those that were reused included."),
    ("reused_tokens", "reused_tokens", "Tokens of prompts that were in the cache already and not read."),
    ("generated_tokens", "generated_tokens", "Tokens that were generated."),
    ("drafted_tokens", "drafted_tokens", "Tokens that speculation proposed."),
    ("accepted_tokens", "accepted_tokens", "Proposed tokens that were the model's choice as well."),
    ("evicted_rows", "kv_evicted_rows", "KV rows that budgets let go, over the layers, per KV head."),
)
_GAUGES = (
    ("loaded", "loaded", "Whether the model is loaded (1) or not (0)."),
    ("running", "generations_running", "Generations that have a slot."),
    ("queued", "generations_queued", "Generations that wait for a slot."),
    ("queue_limit", "queue_limit", "Generations that may wait at most."),
    ("kv_bytes", "kv_bytes", "Size of the KV cache after prompts."),
    ("kv_bytes_allocated", "kv_bytes_allocated", "Size of the KV cache with what reading prompts takes."),
    ("kv_bytes_planned", "kv_bytes_planned", "Size of the KV cache that was planned."),
    ("prefill_tokens_per_second", "prefill_tokens_per_second", "Prompt tokens read a second, lately, all slots."),
    ("decode_tokens_per_second", "decode_tokens_per_second", "Tokens generated a second, lately, all slots."),
)
_SLOT_STATES = ("idle", "reading", "decoding")


class Metrics:
    """What is measured. ``render`` gives it as Prometheus reads it; everything else feeds it."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.in_flight = Gauge(
            "ziggurat_http_requests_in_flight", "HTTP requests that are being answered.", registry=self.registry
        )
        self._requests = Counter(
            "ziggurat_http_requests",
            "HTTP requests by route, method and status (499: the client left before it).",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "ziggurat_http_request_seconds",
            "Time from a request's head to the end of its answer.",
            ["route"],
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self._first_token = Histogram(
            "ziggurat_time_to_first_token_seconds",
            "Time from a request's head to the first token of each of its answers.",
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )
        self._gap = Histogram(
            "ziggurat_inter_token_seconds",
            "Time between two tokens of an answer.",
            buckets=_GAP_S,
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine))

    def request(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        route = record.route or "none"
        method = record.method if record.method in _METHODS else "other"
        self._requests.labels(route, method, str(record.status or 499)).inc()
        self._seconds.labels(route).observe(record.seconds)

    def first_token(self, seconds: float) -> None:
        """Count an answer's first token; see ``record.Observer``."""
        self._first_token.observe(seconds)

    def gap(self, seconds: float) -> None:
        """Count an answer's next token; see ``record.Observer``."""
        self._gap.observe(seconds)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format, of ``CONTENT_TYPE``."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Asks the engine when somebody asks for the metrics."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Return nothing: the registry would collect once at registration, before there is a model."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats: EngineStats = self._engine.stats()
        for field, name, text in _COUNTERS:
            yield CounterMetricFamily(f"ziggurat_{name}", text, value=getattr(stats, field))
        for field, name, text in _GAUGES:
            yield GaugeMetricFamily(f"ziggurat_{name}", text, value=float(getattr(stats, field)))
        slots = GaugeMetricFamily("ziggurat_slots", "Slots by what they do.", labels=["state"])
        for state in _SLOT_STATES:
            slots.add_metric([state], sum(slot.state == state for slot in stats.slots))
        yield slots
        held = sum(slot.kv_bytes for slot in stats.slots)
        yield GaugeMetricFamily("ziggurat_kv_bytes_held", "Size of the KV rows that slots hold.", value=held)
        rows = sum(slot.rows for slot in stats.slots)
        yield GaugeMetricFamily("ziggurat_kv_rows", "KV rows held, over slots and layers, per KV head.", value=rows)
