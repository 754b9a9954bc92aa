"""What a simulation found, in numbers: JSON, CSV and a table."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from paged_backend.simulate.simulation import Run
from paged_backend.simulate.timeline import MemoryUse
from paged_backend.simulate.trace import Trace


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one latency, in seconds; NaN (null in JSON) when nothing was measured."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: npt.NDArray[np.float64]) -> Spread:
        """NaN entries are left out."""
        known = seconds[~np.isnan(seconds)]
        if not len(known):
            return cls(*[float("nan")] * 4)
        return cls(float(known.mean()), *np.percentile(known, [50, 90, 99]).tolist())


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of some requests of a run."""

    requests: int
    finished: int
    ttft: Spread
    """Arrival to first token."""
    tpot: Spread
    """Token to token, the mean of each request."""
    latency: Spread
    """Arrival to last token."""


@dataclass(frozen=True, slots=True)
class Report:
    """One run."""

    label: str
    reserve: str
    scheduling_policy: str
    replicas: int
    everyone: Latencies
    tenants: dict[str, Latencies]
    """By name; empty when there is only one."""
    refused: int
    """Too long for the model's context, or sent when the waiting queue was full."""
    seconds: float
    """Simulated, from the first arrival to the last token."""
    wall_seconds: float
    """That the simulation took."""
    prompt_tokens: int
    """Of the finished requests."""
    output_tokens: int
    preemptions: int
    hit_rate: float
    """Part of the prompt tokens that was found in the prefix cache."""
    running: float
    """Mean requests in one replica while it is busy."""
    memory: MemoryUse
    """While requests waited for room (blocks or slots); where none did, while the replicas were busy."""
    memory_was_full: bool

    @classmethod
    def of(cls, run: Run, label: str, wall_seconds: float) -> Report:
        """Sum a run up; `label` tells it from others."""
        outcomes, trace = run.outcomes, run.outcomes.trace
        capacity = run.setup.num_blocks * run.setup.config.block_size
        whole, full = (run.timeline.memory(capacity, full) for full in (False, True))
        started = ~np.isnan(outcomes.started)
        prompts = int(trace.prompt[started].sum())
        names = {name: trace.tenant == index for index, name in enumerate(trace.tenants)}
        return cls(
            label=label,
            reserve=run.setup.reserve,
            scheduling_policy=run.setup.config.scheduling_policy,
            replicas=len(run.replicas),
            everyone=_latencies(run, np.ones(len(trace), dtype=bool)),
            tenants={name: _latencies(run, rows) for name, rows in names.items()} if len(names) > 1 else {},
            refused=int(outcomes.refused.sum()),
            seconds=run.end - float(trace.arrival[0]),
            wall_seconds=round(wall_seconds, 3),
            prompt_tokens=int(trace.prompt[outcomes.finished].sum()),
            output_tokens=int(outcomes.output[outcomes.finished].sum()),
            preemptions=int(outcomes.preemptions.sum()),
            hit_rate=int(outcomes.cached.sum()) / prompts if prompts else 0.0,
            running=whole.running,
            memory=full if full.seconds else whole,
            memory_was_full=full.seconds > 0,
        )

    def document(self) -> dict[str, object]:
        """As JSON writes it."""
        memory = self.memory
        return {
            "label": self.label,
            "reserve": self.reserve,
            "scheduling_policy": self.scheduling_policy,
            "replicas": self.replicas,
            "requests": self.everyone.requests,
            "finished": self.everyone.finished,
            "refused": self.refused,
            "simulated_seconds": self.seconds,
            "wall_seconds": self.wall_seconds,
            "requests_per_second": self.everyone.finished / self.seconds if self.seconds else None,
            "output_tokens_per_second": self.output_tokens / self.seconds if self.seconds else None,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            **_document(self.everyone),
            "preemptions": self.preemptions,
            "hit_rate": self.hit_rate,
            "mean_running": self.running,
            "memory": {
                "measured_while": "requests wait for room" if self.memory_was_full else "busy",
                "replica_seconds": memory.seconds,
                "capacity_tokens": memory.capacity,
                "used": memory.used / memory.capacity,
                "reserved": memory.reserved / memory.capacity,
                "internal_fragmentation": memory.internal / memory.capacity,
                "external_fragmentation_and_others": memory.external / memory.capacity,
                "waste_of_allocated": memory.waste,
                "requests_that_fit": memory.running if self.memory_was_full else None,
            },
            "tenants": {
                name: {"requests": each.requests, "finished": each.finished} | _document(each)
                for name, each in self.tenants.items()
            },
        }


def table(reports: list[Report]) -> Table:
    """One column a run."""
    shown = Table("", *(report.label for report in reports))
    for column in shown.columns[1:]:
        column.justify = "right"

    def row(name: str, values: list[str]) -> None:
        shown.add_row(name, *values)

    row("requests finished", [f"{each.everyone.finished:,}" for each in reports])
    row("requests refused", [f"{each.refused:,}" for each in reports])
    row("simulated s", [f"{each.seconds:,.1f}" for each in reports])
    row("requests/s", [f"{each.everyone.finished / (each.seconds or 1):,.2f}" for each in reports])
    row("output tok/s", [f"{each.output_tokens / (each.seconds or 1):,.0f}" for each in reports])
    row("TTFT p50 / p99 ms", [_pair(each.everyone.ttft) for each in reports])
    row("TPOT p50 / p99 ms", [_pair(each.everyone.tpot) for each in reports])
    row("preemptions", [f"{each.preemptions:,}" for each in reports])
    row("prefix hit rate", [f"{each.hit_rate:.1%}" for each in reports])
    row("running, mean", [f"{each.running:,.1f}" for each in reports])
    row("memory seen while", ["requests wait" if each.memory_was_full else "busy" for each in reports])
    for part in ("used", "reserved", "internal", "external"):
        label = f"  {part}" + {"internal": " fragm.", "external": ", free"}.get(part, "")
        row(label, [f"{getattr(each.memory, part) / each.memory.capacity:.1%}" for each in reports])
    row("  waste of allocated", [f"{each.memory.waste:.1%}" for each in reports])
    row("  requests that fit", [f"{each.memory.running:,.1f}" if each.memory_was_full else "-" for each in reports])
    for name in dict.fromkeys(name for each in reports for name in each.tenants):
        of = [each.tenants.get(name) for each in reports]
        row(f"{name or 'others'}: TTFT p50 / p99 ms", [_pair(each.ttft) if each else "-" for each in of])
    row("wall s", [f"{each.wall_seconds:,.1f}" for each in reports])
    return shown


_COLUMNS = (
    *("run", "request", "tenant", "arrival", "prompt", "output", "status", "replica"),
    *("queue_seconds", "ttft", "tpot", "latency", "cached_tokens", "preemptions"),
)


def write_csv(runs: list[Run], reports: list[Report], path: Path) -> None:
    """One row a request and run, in order of arrival; times in seconds, empty where there is none."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for run, report in zip(runs, reports, strict=True):
            outcomes, trace = run.outcomes, run.outcomes.trace
            status = np.where(outcomes.finished, "finished", "refused").tolist()
            names = [trace.tenants[index] for index in trace.tenant.tolist()]
            counts = (outcomes.cached.tolist(), outcomes.preemptions.tolist())
            times = [
                ["" if value != value else f"{value:.6f}" for value in column.tolist()]
                for column in (outcomes.started - trace.arrival, outcomes.ttft, outcomes.tpot, outcomes.latency)
            ]
            rows = zip(
                names,
                [f"{value:.6f}" for value in trace.arrival.tolist()],
                trace.prompt.tolist(),
                trace.output.tolist(),
                status,
                outcomes.replica.tolist(),
                *times,
                *counts,
                strict=True,
            )
            writer.writerows((report.label, number, *row) for number, row in enumerate(rows))


def describe(trace: Trace) -> dict[str, object]:
    """A trace in a few numbers."""
    return {
        "requests": len(trace),
        "requests_per_second": trace.rate,
        "mean_prompt_tokens": float(trace.prompt.mean()),
        "mean_output_tokens": float(trace.output.mean()),
        "longest_tokens": int((trace.prompt + trace.output).max()),
        "tenants": len(trace.tenants),
        "prefixes": len(np.unique(trace.prefix[trace.prefix >= 0])),
    }


def _latencies(run: Run, rows: npt.NDArray[np.bool_]) -> Latencies:
    outcomes = run.outcomes
    return Latencies(
        int(rows.sum()),
        int(outcomes.finished[rows].sum()),
        Spread.of(outcomes.ttft[rows]),
        Spread.of(outcomes.tpot[rows]),
        Spread.of(outcomes.latency[rows]),
    )


def _document(latencies: Latencies) -> dict[str, object]:
    return {
        f"{name}_seconds": {field: getattr(spread, field) for field in Spread.__slots__}
        for name, spread in (("ttft", latencies.ttft), ("tpot", latencies.tpot), ("latency", latencies.latency))
    }


def _pair(spread: Spread) -> str:
    return f"{spread.p50 * 1e3:,.1f} / {spread.p99 * 1e3:,.1f}"
