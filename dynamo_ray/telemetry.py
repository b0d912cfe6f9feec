"""What this process counts, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from backends.engine import TokenChunk

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_OUTSIDE_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
_ITL_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_E2E_BUCKETS_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Reading = tuple[str, str, dict[str, str], float]
"""(name, what it is, labels, value) read when scraped: a counter if its name ends in _total, else a gauge."""


class Telemetry:
    """One ingress replica's metrics, in a registry of their own.

    `readings` is called at every scrape for what is cheaper to look up than to keep counting.
    """

    def __init__(self, readings: Callable[[], Iterable[Reading]] = lambda: ()) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("dynamo_ray_requests", "Requests answered", ["endpoint", "status"], registry=registry)
        self.errors = Counter("dynamo_ray_errors", "Errors told to clients", ["code"], registry=registry)
        self.in_flight = Gauge("dynamo_ray_requests_in_flight", "Requests being answered", registry=registry)
        self.ttft_s = Histogram(
            "dynamo_ray_ttft_seconds", "Arrival to first token", buckets=_TTFT_BUCKETS_S, registry=registry
        )
        self.outside_s = Histogram(
            "dynamo_ray_ttft_outside_engines_seconds",
            "Of the time to the first token, what it was not in an engine for: intake, queue, choice, wire, retries",
            buckets=_OUTSIDE_BUCKETS_S,
            registry=registry,
        )
        self.itl_s = Histogram(
            "dynamo_ray_itl_seconds",
            "Mean time between tokens, one observation a choice",
            buckets=_ITL_BUCKETS_S,
            registry=registry,
        )
        self.e2e_s = Histogram(
            "dynamo_ray_request_seconds", "Arrival to last token", buckets=_E2E_BUCKETS_S, registry=registry
        )
        self.prompt_tokens = Counter("dynamo_ray_prompt_tokens", "Prompt tokens", registry=registry)
        self.generated_tokens = Counter("dynamo_ray_generated_tokens", "Tokens generated", registry=registry)
        self.cached_tokens = Counter(
            "dynamo_ray_cached_tokens", "Prompt tokens found in a prefix cache", registry=registry
        )
        self.transferred_tokens = Counter(
            "dynamo_ray_transferred_tokens", "Prompt tokens whose KV came from a prefill worker", registry=registry
        )
        registry.register(_Readings(readings))

    def generation(self, arrived_s: float) -> GenerationProgress:
        """Follows one choice of a request that came at that time of `time.perf_counter`."""
        return GenerationProgress(self, arrived_s)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class GenerationProgress:
    """One choice's latencies and tokens; costs a clock reading a chunk, the rest once."""

    __slots__ = ("_arrived_s", "_first_s", "_last_s", "_telemetry")

    def __init__(self, telemetry: Telemetry, arrived_s: float) -> None:
        self._telemetry = telemetry
        self._arrived_s = arrived_s
        self._first_s = self._last_s = 0.0

    def tokens_came(self, chunk: TokenChunk) -> bool:
        """Whether this is the choice's first chunk."""
        self._last_s = time.perf_counter()
        if self._first_s:
            return False
        self._first_s = self._last_s
        ttft_s = self._first_s - self._arrived_s
        self._telemetry.ttft_s.observe(ttft_s)
        if chunk.engine_s is not None:
            self._telemetry.outside_s.observe(max(0.0, ttft_s - chunk.engine_s))
        self._telemetry.cached_tokens.inc(chunk.cached_tokens or 0)
        self._telemetry.transferred_tokens.inc(chunk.transferred_tokens or 0)
        return True

    def ended(self, num_tokens: int) -> None:
        self._telemetry.generated_tokens.inc(num_tokens)
        if num_tokens > 1:
            self._telemetry.itl_s.observe((self._last_s - self._first_s) / (num_tokens - 1))


class _Readings(Collector):
    def __init__(self, readings: Callable[[], Iterable[Reading]]) -> None:
        self._readings = readings

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, documentation, labels, value in self._readings():
            if name not in families:
                family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                families[name] = family(name, documentation, labels=list(labels))
            families[name].add_metric(list(labels.values()), value)
        return families.values()
