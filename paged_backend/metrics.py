"""One Prometheus registry per engine, read by every front end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from paged_backend.plugins import hookimpl
from paged_backend.stats import EngineStats

if TYPE_CHECKING:
    from paged_backend.request import Request

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """A plugin that keeps `registry`: gauges and totals read from the engine when asked, latencies from its hooks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
        self.registry = registry = CollectorRegistry()
        registry.register(self)

        def histogram(name: str, help_text: str) -> Histogram:
            return Histogram(f"paged_backend_{name}_seconds", help_text, buckets=_SECONDS, registry=registry)

        self._ended = Counter(
            "paged_backend_requests_ended", "Requests ended, by reason", ["reason"], registry=registry
        )
        self._queue = histogram("queue", "Arrival to first slot")
        self._ttft = histogram("time_to_first_token", "Arrival to first token")
        self._tpot = histogram("time_per_output_token", "Mean time between one request's tokens")
        self._e2e = histogram("request", "Arrival to end")

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's collector protocol."""
        now = self._stats()
        for name, help_text, value in (
            ("requests_running", "Requests with a slot", now.num_running),
            ("requests_waiting", "Requests waiting for a slot", now.num_waiting),
            ("kv_blocks_used", "KV blocks owned by requests", now.blocks_used),
            ("kv_blocks_cached", "KV blocks owned by nobody that hold a prefix", now.blocks_cached),
            ("kv_blocks_total", "KV blocks in the cache", now.blocks_total),
        ):
            yield GaugeMetricFamily(f"paged_backend_{name}", help_text, value=value)
        for name, help_text, value in (
            ("steps", "Engine steps", now.steps),
            ("computed_tokens", "Tokens run through the model, recomputation included", now.computed_tokens),
            ("cached_tokens", "Prompt tokens found in the cache instead", now.cached_tokens),
            ("output_tokens", "Tokens generated", now.output_tokens),
            ("preemptions", "Running requests sent back to the queue", now.preemptions),
            ("preemptions_swapped", "Of those, kept in host memory", now.swapped),
            ("kv_blocks_stored", "KV blocks copied to host memory", now.blocks_stored),
            ("kv_blocks_fetched", "KV blocks copied back", now.blocks_fetched),
        ):
            yield CounterMetricFamily(f"paged_backend_{name}", help_text, value=value)

    @hookimpl
    def paged_request_scheduled(self, request: Request) -> None:
        """Queue time, the first time."""
        a_beam = request.steered and request.num_output_tokens > 0  # that found no room when it was forked
        if request.num_preemptions == 0 and request.scheduled_time is not None and not a_beam:
            self._queue.observe(request.scheduled_time - request.arrival_time)

    @hookimpl
    def paged_request_first_token(self, request: Request) -> None:
        """Time to first token."""
        if request.first_token_time is not None:
            self._ttft.observe(request.first_token_time - request.arrival_time)

    @hookimpl
    def paged_request_ended(self, request: Request) -> None:
        """The reason and the latencies."""
        self._ended.labels(request.finish_reason).inc()
        if request.end_time is None or request.first_token_time is None:
            return
        self._e2e.observe(request.end_time - request.arrival_time)
        if request.num_output_tokens > 1:
            self._tpot.observe((request.end_time - request.first_token_time) / (request.num_output_tokens - 1))
