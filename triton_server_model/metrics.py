"""Shows metrics on Triton's metrics port."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils
from prometheus_client import Metric

from triton_server_model.metric_families import PER_TOKEN, distributions, observations, with_known_names

logger = logging.getLogger(__name__)

_PERIOD_SECONDS = 1.0


class MetricsMirror:
    """Copies the metrics that `collect` gives, with `labels` added, to Triton's custom metrics, once a second.

    Triton has no way to set a histogram: it is brought up to date by observations that have the same effect. Those with
    an observation for every token would take too many, and become the counters `_bucket`, `_sum` and `_count` instead.
    Everything happens on one thread of one process: two updating one Triton metric, or removing it from under the
    other, crash the whole server. So a model that is loaded again over itself shows its metrics once the one before has
    ended.
    """

    def __init__(self, collect: Callable[[], Iterable[Metric]], labels: dict[str, str]) -> None:
        self._collect, self._labels = collect, labels
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._shown: dict[tuple[str, ...], float] = {}
        """Values of counters and gauges, as Triton has them."""
        self._distributions: dict[tuple[str, ...], tuple[Sequence[float], float]] = {}
        """Counts by bucket and sums of histograms, as Triton has them."""
        self._turn = Turn(f"{os.getppid()}/{'/'.join(labels.values())}")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paged-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and remove the metrics from the port."""
        self._closed.set()
        self._thread.join()
        self._metrics.clear()  # before their families, or they stay on the port
        self._families.clear()
        self._turn.end()

    def _run(self) -> None:
        failed = False
        while not self._closed.is_set():
            try:
                for family in with_known_names(self._collect()) if self._turn.begin() else ():
                    if family.type == "histogram" and family.name not in PER_TOKEN:
                        self._observe(family)
                    else:
                        self._copy(family)
                failed = False
            except Exception:
                if not failed:  # once, not every second
                    logger.exception("metrics could not be copied; trying again")
                failed = True
            self._closed.wait(_PERIOD_SECONDS)

    def _copy(self, family: Metric) -> None:
        is_gauge = family.type == "gauge"
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            key = (sample.name, *sample.labels.values())
            if key not in self._metrics:
                self._metrics[key] = self._make(sample.name, family, "GAUGE" if is_gauge else "COUNTER", sample.labels)
            change = sample.value - self._shown.get(key, 0.0)
            if is_gauge and change:
                self._metrics[key].set(sample.value)
            elif change:
                self._metrics[key].increment(change)
            self._shown[key] = sample.value

    def _observe(self, family: Metric) -> None:
        for labels, bounds, counts, total in distributions(family):
            key = (family.name, *labels.values())
            if key not in self._metrics:
                self._metrics[key] = self._make(family.name, family, "HISTOGRAM", labels, buckets=list(bounds[:-1]))
            shown, shown_total = self._distributions.get(key, ((0,) * len(counts), 0.0))
            new = [count - before for count, before in zip(counts, shown, strict=True)]
            values = observations(bounds, new, total - shown_total)
            for value in values:
                self._metrics[key].observe(value)
            # What a sum is ahead of its buckets, which were read before it, comes with the next ones.
            self._distributions[key] = counts, shown_total + math.fsum(values)

    def _make(self, name: str, family: Metric, kind: str, labels: dict[str, str], **arguments: Any) -> Any:
        if name not in self._families:
            self._families[name] = pb_utils.MetricFamily(
                name=name, description=family.documentation, kind=getattr(pb_utils.MetricFamily, kind)
            )
        return self._families[name].Metric(labels=self._labels | labels, **arguments)


class Turn:
    """What one process of this machine has at a time; the kernel ends it with the process."""

    def __init__(self, name: str) -> None:
        # An abstract address: no file is left behind. Containers may share a network, but not process ids too.
        unique = hashlib.sha256(f"{os.readlink('/proc/self/ns/pid')}/{name}".encode()).hexdigest()
        self._address = f"\0paged-backend-{unique}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._bound = False

    def begin(self) -> bool:
        """Whether it is this process's turn."""
        if not self._bound:
            try:
                self._socket.bind(self._address)
            except OSError:
                return False
            self._bound = True
        return True

    def end(self) -> None:
        """Let another have it."""
        self._socket.close()
