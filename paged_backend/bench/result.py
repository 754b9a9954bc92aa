"""What a benchmark found, as JSON."""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from paged_backend.bench.anchors import Anchor
from paged_backend.bench.machine import Machine
from paged_backend.errors import InvalidArgument


@dataclass(slots=True)
class Series:
    """Repeated timed runs of one system."""

    system: str
    settings: dict[str, object]
    load_seconds: float
    """To load the model and be ready to serve; imports are not counted."""
    tokens: int
    """Counted in each run."""
    seconds: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each run."""
        return [self.tokens / seconds for seconds in self.seconds]

    @property
    def median_rate(self) -> float:
        """Tokens per second."""
        return statistics.median(self.rates)

    def document(self) -> dict[str, object]:
        """What goes into a JSON file."""
        rates = {"tokens_per_second": [round(rate, 2) for rate in self.rates]}
        return asdict(self) | rates | {"median_tokens_per_second": round(self.median_rate, 2)}


@dataclass(slots=True)
class ThroughputResult:
    """One workload on one model, on our engine and its peers."""

    workload: str
    num_requests: int
    temperature: float
    top_p: float
    model: str
    dtype: str
    device: str
    unit: str
    """"output tok/s", or "prompt tok/s" where prefill is the work."""
    measured_at: str
    """UTC, ISO 8601."""
    machine: Machine
    anchor: Anchor | None
    series: list[Series]
    """Our engine first; the last is what the others are compared with."""

    def ratio(self, series: Series) -> float:
        """How many times faster `series` is than the last one, by medians."""
        return series.median_rate / self.series[-1].median_rate

    def document(self) -> dict[str, object]:
        """What goes into the JSON file."""
        document = asdict(self)
        document["series"] = [series.document() for series in self.series]
        for series, written in zip(self.series, document["series"], strict=True):
            written["ratio"] = round(self.ratio(series), 4)
            if self.anchor is not None:
                written["ratio_to_anchor"] = round(series.median_rate / self.anchor.highest, 4)
            if self.num_requests == 1:
                written["median_ms_per_token"] = round(1000 / series.median_rate, 4)
        return document


def check_writable(field: str, path: Path | None) -> None:
    """Raises `InvalidArgument` now for a path that could not be written in the end. None is no path."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise InvalidArgument(field, str(path), "its directory does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InvalidArgument(field, str(path), "must be a file that can be written")
