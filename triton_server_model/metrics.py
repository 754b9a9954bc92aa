"""Shows the engine's metrics on Triton's metrics port."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
from typing import Any

import triton_python_backend_utils as pb_utils
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.samples import Sample

logger = logging.getLogger(__name__)

_PERIOD_SECONDS = 0.5


class MetricsMirror:
    """Copies the metrics of `registry` to Triton's custom metrics, each with `labels` added.

    A histogram becomes the counters `_bucket`, `_sum` and `_count` that Prometheus stores it as. Everything happens on
    one thread of one process: two updating one Triton metric, or removing it from under the other, crash the whole
    server. So a model that is loaded again over itself shows its metrics once the one before has ended.
    """

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self._registry, self._labels = registry, labels
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._values: dict[tuple[str, ...], float] = {}
        self._turn = Turn(f"{os.getppid()}/{'/'.join(labels.values())}")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paged-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy once more, end the thread and remove the metrics from the port."""
        self._closed.set()
        self._thread.join()
        self._metrics.clear()  # before their families, or they stay on the port
        self._families.clear()
        self._turn.end()

    def _run(self) -> None:
        closed = False
        while not closed:
            try:
                if self._turn.begin():
                    self._copy()
            except Exception:
                logger.exception("metrics could not be copied; trying again")
            closed = self._closed.wait(_PERIOD_SECONDS)
        if self._turn.begin():
            self._copy()

    def _copy(self) -> None:
        for family in self._registry.collect():
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    self._show(family, sample)

    def _show(self, family: Metric, sample: Sample) -> None:
        key = (sample.name, *sample.labels.values())
        if key not in self._metrics:
            if sample.name not in self._families:
                kind = pb_utils.MetricFamily.GAUGE if family.type == "gauge" else pb_utils.MetricFamily.COUNTER
                self._families[sample.name] = pb_utils.MetricFamily(
                    name=sample.name, description=family.documentation, kind=kind
                )
            self._metrics[key] = self._families[sample.name].Metric(labels=self._labels | sample.labels)
            self._values[key] = 0.0
        change = sample.value - self._values[key]
        if family.type == "gauge" and change:
            self._metrics[key].set(sample.value)
        elif change:
            self._metrics[key].increment(change)
        self._values[key] = sample.value


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
