"""What the engines behind a metrics port are doing, as a table that keeps up with them."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.markup import escape
from rich.table import Table

from triton_server_model.launcher import ServerError

_PREFIX = "paged_backend_"
_WINDOW_SECONDS = 30.0
"""Latencies are those of so long ago until now."""
_BAR_WIDTH = 5
_HEADERS = (
    *("\nrun", "\nwait", "KV\ncache", "tok/s\nin", "\nout"),
    *("TTFT\np50 p99", "TPOT\np50 p99", "cache\nhits", "pre-\nempted"),
)
"""Short, so that 80 columns are enough."""


@dataclass
class Totals:
    """The metrics of one model at one time."""

    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By name, without our prefix, summed over labels."""
    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    """Cumulative counts of histograms, by name and upper bound, summed over labels."""

    def since(self, before: Totals) -> Totals:
        """What counters and buckets have grown by; all of it, if the model was loaded again meanwhile."""
        if before.values["steps_total"] > self.values["steps_total"]:
            before = Totals()
        return Totals(
            defaultdict(float, {name: value - before.values[name] for name, value in self.values.items()}),
            {
                name: {bound: count - before.buckets[name].get(bound, 0.0) for bound, count in buckets.items()}
                for name, buckets in self.buckets.items()
            },
        )

    def quantile(self, name: str, share: float) -> float | None:
        """Of a histogram, as PromQL's `histogram_quantile` has it: within a bucket it goes by proportion."""
        buckets = sorted(self.buckets.get(name, {}).items())
        if not buckets or not buckets[-1][1]:
            return None
        rank, below, low = share * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if count >= rank and count > below:
                return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
            below, low = count, bound
        return low


Models = dict[tuple[str, str], Totals]
"""By name and version."""


def parse(page: str) -> Models:
    """The engines' metrics on a page of Prometheus' text format. Raises ValueError for anything else."""
    models: Models = defaultdict(Totals)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if not sample.name.startswith(_PREFIX):
                continue
            totals = models[sample.labels.get("model", ""), sample.labels.get("version", "")]
            name = sample.name.removeprefix(_PREFIX)
            if "le" in sample.labels:  # the parser puts `_total` behind every name of a counter
                buckets = totals.buckets[name.removesuffix("_total").removesuffix("_bucket")]
                buckets[float(sample.labels["le"])] += sample.value
            else:
                totals.values[name] += sample.value
    return dict(models)


class Watch:
    """Scrapes a metrics port and shows what changed."""

    def __init__(self, url: str) -> None:
        self._url, self._client = url, httpx.Client(timeout=5, trust_env=False)
        self._history: deque[tuple[float, Models]] = deque()

    def look(self) -> None:
        """Scrape. Raises `ServerError` when there is no server, or something else than metrics."""
        try:
            answer = self._client.get(self._url)
            answer.raise_for_status()
            models = parse(answer.text)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ServerError(f"no metrics from {self._url}: {error}") from None
        now = time.monotonic()
        self._history.append((now, models))
        while len(self._history) > 2 and now - self._history[0][0] > _WINDOW_SECONDS:
            self._history.popleft()

    def table(self, *, of_all_time: bool = False) -> Table:
        """A row for each model. Rates are since the last look; the rest is of the last seconds, or `of_all_time`."""
        before_last = self._history[-2] if len(self._history) > 1 else self._history[-1]
        (then, before), (now, models), (start, oldest) = before_last, self._history[-1], self._history[0]
        span = "since the model was loaded" if of_all_time else f"of the last {now - start:.0f} s"
        table = Table(
            title=escape(self._url), caption=f"latencies and cache hits {span}", box=None, padding=(0, 1, 0, 0)
        )
        table.add_column("\nmodel", overflow="fold")
        for header in _HEADERS:
            table.add_column(header, justify="right", no_wrap=True)
        for model, totals in sorted(models.items()):
            change = totals.since(before.get(model, Totals()))
            recent = totals if of_all_time else totals.since(oldest.get(model, Totals()))
            queried = recent.values["queried_tokens_total"]
            table.add_row(
                escape(":".join(model)),
                *(f"{totals.values[name]:,.0f}" for name in ("requests_running", "requests_waiting")),
                _bar(totals.values["kv_blocks_used"] / (totals.values["kv_blocks_total"] or 1)),
                *(_rate(change.values[name], now - then) for name in ("prompt_tokens_total", "output_tokens_total")),
                *(_latencies(recent, name) for name in ("time_to_first_token_seconds", "inter_token_seconds")),
                f"{recent.values['cached_tokens_total'] / queried:.0%}" if queried else "-",
                f"{totals.values['preemptions_total']:,.0f}",
            )
        if not models:
            table.caption = "no model of paged-backend is loaded"
        return table


def _bar(share: float) -> str:
    full = math.ceil(share * _BAR_WIDTH)
    return f"{'█' * full}{'░' * (_BAR_WIDTH - full)} {share:4.0%}"


def _rate(count: float, seconds: float) -> str:
    rate = count / seconds if seconds else math.nan
    return "-" if math.isnan(rate) else f"{rate:.0f}" if rate < 9999.5 else f"{rate / 1e3:.0f}k"


def _latencies(totals: Totals, name: str) -> str:
    return " ".join(f"{_duration(totals.quantile(name, share)):>5}" for share in (0.5, 0.99))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds >= 0.9995:
        return f"{seconds:.1f}s" if seconds < 99.95 else f"{seconds:.0f}s"
    return f"{seconds * 1e3:.1f}ms" if seconds < 0.00995 else f"{seconds * 1e3:.0f}ms"
