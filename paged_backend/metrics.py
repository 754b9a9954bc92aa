"""One Prometheus registry per engine, read by every front end."""

from __future__ import annotations

import collections
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from paged_backend.plugins import hookimpl
from paged_backend.request import FinishReason
from paged_backend.stats import EngineStats, StepStats

if TYPE_CHECKING:
    from paged_backend.request import Request

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300, 600),
)
"""Of a request: from a cached prompt on an idle GPU to a long output on a busy one."""
_STEP_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10),
)
"""Between two tokens."""
_TOKENS = tuple(2**power for power in range(18))
_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """A plugin that keeps `registry`: gauges and totals read from the engine when asked, the rest from its hooks.

    What is said of a request holds for each of its `n` outputs, except for what concerns its prompt.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
        self.registry = registry = CollectorRegistry()
        registry.register(self)

        def histogram(name: str, help_text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"paged_backend_{name}", help_text, buckets=buckets, registry=registry)

        self._ended = Counter(
            "paged_backend_requests_ended", "Requests ended, by reason", ["reason"], registry=registry
        )
        for reason in get_args(FinishReason):
            self._ended.labels(reason)  # shown from the start: the rate of what appears with its first event is wrong
        self._prompt_tokens = Counter(
            "paged_backend_prompt_tokens", "Prompt tokens of requests that have a first token", registry=registry
        )
        self._queue = histogram("queue_seconds", "Arrival to first slot")
        self._prefill = histogram("prefill_seconds", "First slot to first token")
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token")
        self._tpot = histogram("time_per_output_token_seconds", "Mean time between one request's tokens", _STEP_SECONDS)
        self._e2e = histogram("request_seconds", "Arrival to end, of requests that have a first token")
        self._request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._request_output_tokens = histogram("request_output_tokens", "Tokens generated for a request", _TOKENS)
        self._request_n = histogram("request_n", "Outputs asked for by a request", _SAMPLES)
        self._gaps, self._gap_seconds = [0] * (len(_STEP_SECONDS) + 1), 0.0

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's collector protocol."""
        now = self._stats()
        for name, help_text, value in (
            ("requests_running", "Requests with a slot", now.num_running),
            ("requests_waiting", "Requests waiting for a slot", now.num_waiting),
            ("kv_blocks_used", "KV blocks owned by requests", now.blocks_used),
            ("kv_blocks_cached", "KV blocks owned by nobody that hold a prefix", now.blocks_cached),
            ("kv_blocks_total", "KV blocks in the cache", now.blocks_total),
            ("kv_block_tokens", "Tokens of a KV block", now.block_size),
        ):
            yield GaugeMetricFamily(f"paged_backend_{name}", help_text, value=value)
        for name, help_text, value in (
            ("steps", "Engine steps", now.steps),
            ("computed_tokens", "Tokens run through the model, recomputation included", now.computed_tokens),
            ("cached_tokens", "Prompt tokens found in the cache instead", now.cached_tokens),
            ("queried_tokens", "Prompt tokens looked for in the cache", now.queried_tokens),
            ("output_tokens", "Tokens generated", now.output_tokens),
            ("preemptions", "Running requests sent back to the queue", now.preemptions),
            ("preemptions_swapped", "Of those, kept in host memory", now.swapped),
            ("kv_blocks_stored", "KV blocks copied to host memory", now.blocks_stored),
            ("kv_blocks_fetched", "KV blocks copied back", now.blocks_fetched),
        ):
            yield CounterMetricFamily(f"paged_backend_{name}", help_text, value=value)
        bounds = [*map(floatToGoString, _STEP_SECONDS), "+Inf"]
        yield HistogramMetricFamily(
            "paged_backend_inter_token_seconds",
            "Time since the request's token before, of every token but its first",
            buckets=list(zip(bounds, itertools.accumulate(self._gaps), strict=True)),
            sum_value=self._gap_seconds,
        )

    @hookimpl
    def paged_request_scheduled(self, request: Request) -> None:
        """Queue time, the first time."""
        a_beam = request.steered and request.num_output_tokens > 0  # that found no room when it was forked
        if request.num_preemptions == 0 and request.scheduled_time is not None and not a_beam:
            self._queue.observe(request.scheduled_time - request.arrival_time)

    @hookimpl
    def paged_request_first_token(self, request: Request) -> None:
        """Time to first token, and the prompt."""
        if request.first_token_time is None or request.scheduled_time is None:
            return
        self._ttft.observe(request.first_token_time - request.arrival_time)
        self._prefill.observe(request.first_token_time - request.scheduled_time)
        if request.index == 0:
            self._prompt_tokens.inc(request.num_prompt_tokens)

    @hookimpl
    def paged_request_ended(self, request: Request) -> None:
        """The reason, the size and the latencies."""
        self._ended.labels(request.finish_reason).inc()
        if request.end_time is None or request.first_token_time is None:
            return
        if request.index == 0:
            self._request_prompt_tokens.observe(request.num_prompt_tokens)
            self._request_n.observe(request.params.n)
        self._request_output_tokens.observe(request.num_output_tokens)
        self._e2e.observe(request.end_time - request.arrival_time)
        if request.num_output_tokens > 1:
            self._tpot.observe((request.end_time - request.first_token_time) / (request.num_output_tokens - 1))

    @hookimpl
    def paged_step_ended(self, stats: StepStats) -> None:
        """Times between tokens. Most of a step's are equal, so one does not cost what an `observe` does."""
        for seconds, count in collections.Counter(stats.token_gaps).items():
            self._gaps[bisect_left(_STEP_SECONDS, seconds)] += count
            self._gap_seconds += seconds * count
