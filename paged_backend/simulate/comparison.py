"""One trace on several setups, with and without a noisy tenant, side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from paged_backend.simulate.names import NOISY
from paged_backend.simulate.report import Report, Spread, describe
from paged_backend.simulate.setup import Setup
from paged_backend.simulate.simulation import Run, simulate
from paged_backend.simulate.trace import Trace


@dataclass(slots=True)
class Comparison:
    """Runs of a trace, in the order of the setups; with noise, each after one of the trace without it."""

    trace: Trace
    setups: Sequence[Setup]
    num_replicas: int
    router: str
    quiet: Trace | None = None
    """The trace without the noisy tenant; None when there is none."""
    runs: list[Run] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    def run(self) -> None:
        """Simulate all. Raises `InvalidArgument` as `simulate` does."""
        for setup in self.setups:
            for trace in (self.trace,) if self.quiet is None else (self.quiet, self.trace):
                label, began = self._label(setup, trace), time.perf_counter()
                self.runs.append(_simulate(trace, setup, self.num_replicas, self.router, label))
                self.reports.append(Report.of(self.runs[-1], label, time.perf_counter() - began))

    @property
    def ratios(self) -> dict[str, float]:
        """By run with noise: how many times its p99 TTFT, but for the noisy tenant's, is that without noise."""
        found: dict[str, float] = {}
        for at in range(1, len(self.runs), 2) if self.quiet is not None else ():
            p99 = []
            for run in self.runs[at - 1 : at + 1]:
                trace = run.outcomes.trace
                others = np.array([name != NOISY for name in trace.tenants])[trace.tenant]
                p99.append(Spread.of(run.outcomes.ttft[others]).p99)
            found[self.reports[at].label] = p99[1] / p99[0]
        return found

    @property
    def title(self) -> str:
        """One line on what was run."""
        trace, setup = self.trace, self.setups[0]
        rate = "all at once" if math.isinf(trace.rate) else f"at {trace.rate:,.4g}/s"
        lengths = f"mean prompt {trace.prompt.mean():.0f}, output {trace.output.mean():.0f} tokens"
        replicas = f"{self.num_replicas} " if self.num_replicas > 1 else ""
        policy = "" if self._by_policy else f", {setup.config.scheduling_policy}"
        where = f"{setup.model.name} on {replicas}{setup.device.name}"
        return f"Simulated: {len(trace):,} requests {rate} ({lengths}), {where}{policy}"

    def document(self) -> dict[str, object]:
        """As JSON writes it, with null for what has no value."""
        setup = self.setups[0]
        settings = {
            "model": setup.model.model_dump(),
            "device": setup.device.model_dump(),
            "step_time": "roofline" if setup.step_time is None else vars(setup.step_time),
            "config": setup.config.model_dump(exclude_unset=True, exclude_none=True, exclude={"scheduling_policy"}),
            "max_model_len": setup.max_model_len,
            "num_blocks": setup.num_blocks,
            "replicas": self.num_replicas,
            "router": self.router,
            "allocator": setup.allocator,
        }
        document = {
            "settings": settings,
            "trace": describe(self.trace),
            "runs": [report.document() for report in self.reports],
        }
        if self.quiet is not None:
            document["p99_ttft_of_others_with_noise_to_without"] = self.ratios
        finite = _finite(document)
        assert isinstance(finite, dict)
        return finite

    @property
    def _by_policy(self) -> bool:
        return len({setup.config.scheduling_policy for setup in self.setups}) > 1

    def _label(self, setup: Setup, trace: Trace) -> str:
        """What tells a run from the others."""
        by_mode = len({setup.reserve for setup in self.setups}) > 1
        parts = [setup.config.scheduling_policy] if self._by_policy else []
        parts += [setup.reserve] if by_mode or not self._by_policy else []
        return ", ".join(parts + (["without noise"] if trace is self.quiet else []))


def _simulate(trace: Trace, setup: Setup, replicas: int, router: str, label: str) -> Run:
    """Simulate, with a progress bar while stderr is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn(label),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} requests"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(trace))
        return simulate(trace, setup, replicas, router, progress=lambda ended: progress.update(bar, completed=ended))


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
