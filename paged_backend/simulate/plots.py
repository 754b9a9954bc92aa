"""Pictures of simulations. Needs matplotlib (`pip install paged-backend[bench]`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from paged_backend.figures import GRID, INK, figure, plain, save
from paged_backend.simulate.names import NOISY
from paged_backend.simulate.report import Report
from paged_backend.simulate.simulation import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_USED, _RESERVED, _INTERNAL, _EXTERNAL = "#2f6f9f", "#8fbcd9", "#e3a857", "#d9d9d9"


def write_png(runs: list[Run], reports: list[Report], title: str, path: Path) -> None:
    """Of one run: latencies and load over time.

    Of several that reserve memory differently: how each uses it, and how many requests fit. Of other runs: latencies.
    """
    if len(runs) == 1:
        made = _run_figure(runs[0], title)
    elif len({report.reserve for report in reports}) > 1:
        made = _memory_figure(reports, title)
    else:
        made = _latency_figure(runs, reports, title)
    save(made, path)


def _memory_figure(reports: list[Report], title: str) -> Figure:
    made = figure(10, 3.2, title)
    shares, fit = made.subplots(1, 2, width_ratios=[2.2, 1], sharey=True)
    names = [report.label for report in reports]
    at = np.arange(len(names))
    left = np.zeros(len(names))
    for label, color, part in (
        ("used", _USED, "used"),
        ("reserved", _RESERVED, "reserved"),
        ("internal fragmentation", _INTERNAL, "internal"),
        ("external fragmentation, others", _EXTERNAL, "external"),
    ):
        values = np.array([getattr(each.memory, part) / each.memory.capacity for each in reports]) * 100
        shares.barh(at, values, left=left, color=color, label=label, height=0.62)
        for row, value in enumerate(values.tolist()):
            if value >= 3.5:
                ink = "white" if color == _USED else INK
                shares.text(left[row] + value / 2, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=ink)
        left += values
    plain(shares, "KV memory while requests wait for room", "% of KV memory, mean over time", "")
    shares.set_yticks(at, names)
    shares.set_xlim(0, 100)
    shares.invert_yaxis()
    shares.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, fontsize=8, frameon=False)
    counts = np.array([each.memory.running for each in reports])
    fit.barh(at, counts, color=_USED, height=0.62)
    for row, count in enumerate(counts.tolist()):
        times = f"  {count:,.0f}" + (f" ({counts[0] / count:.1f}x fewer)" if row and count else "")
        inside = count > 0.6 * counts.max()
        fit.text(
            count,
            row,
            times + ("  " if inside else ""),
            ha="right" if inside else "left",
            va="center",
            fontsize=9,
            color="white" if inside else INK,
        )
    plain(fit, "Requests that fit", "running at once, mean over time", "")
    return made


def _latency_figure(runs: list[Run], reports: list[Report], title: str) -> Figure:
    made = figure(10, 3.6, title)
    first, gap = made.subplots(1, 2)
    for run, report in zip(runs, reports, strict=True):
        trace = run.outcomes.trace
        quiet = np.array([name != NOISY for name in trace.tenants])[trace.tenant]
        _cumulative(first, run.outcomes.ttft[quiet] * 1e3, report.label)
        _cumulative(gap, run.outcomes.tpot[quiet] * 1e3, report.label)
    others = f", of all tenants but {NOISY!r}" if NOISY in runs[-1].outcomes.trace.tenants else ""
    for axes, name in ((first, "TTFT"), (gap, "TPOT")):
        _finish_cumulative(axes, f"{name}{others}")
        axes.legend(fontsize=8, frameon=False, loc="best")
    return made


def _finish_cumulative(axes: Axes, name: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plain(axes, f"{name} (p50 and p99 marked)", "ms", "part of the requests")
    axes.set_ylim(0, 1.02)
    shown = [np.asarray(line.get_xdata(), dtype=np.float64) for line in axes.lines]
    low, high = min((x[0] for x in shown), default=0.0), max((x[-1] for x in shown), default=0.0)
    if high > 8 * low > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID)


def _run_figure(run: Run, title: str) -> Figure:
    made = figure(10, 6.4, title)
    (first, gap), (load, memory) = made.subplots(2, 2)
    outcomes, trace = run.outcomes, run.outcomes.trace
    tenants = [(name or "others", trace.tenant == index) for index, name in enumerate(trace.tenants)]
    if not 1 < len(tenants) <= 6:
        tenants = [("all", np.ones(len(trace), dtype=bool))]
    for axes, name, values in ((first, "TTFT", outcomes.ttft), (gap, "TPOT", outcomes.tpot)):
        for tenant, rows in tenants:
            _cumulative(axes, values[rows] * 1e3, tenant)
        _finish_cumulative(axes, name)
        if len(tenants) > 1:
            axes.legend(fontsize=8, frameon=False)
    seconds, series = run.timeline.series(run.end)
    replicas = len(run.replicas)
    load.plot(seconds, series["running"], color=_USED, lw=1.2, label="running")
    load.plot(seconds, series["waiting"], color=_INTERNAL, lw=1.2, label="waiting")
    plain(load, "Requests" + (f" in {replicas} replicas" if replicas > 1 else ""), "simulated s", "")
    load.set_ylim(bottom=0)
    load.grid(color=GRID)
    load.legend(fontsize=8, frameon=False)
    capacity = run.setup.num_blocks * run.setup.config.block_size * replicas
    parts = [series[name] / capacity * 100 for name in ("used", "reserved", "internal")]
    labels = ["used", "reserved", "internal fragmentation"]
    memory.stackplot(seconds, *parts, labels=labels, colors=[_USED, _RESERVED, _INTERNAL])
    plain(memory, "KV memory", "simulated s", "% of KV memory")
    memory.set_ylim(0, 100)
    memory.grid(color=GRID)
    memory.legend(fontsize=8, frameon=False, loc="upper left")
    return made


def _cumulative(axes: Axes, values: npt.NDArray[np.float64], label: str) -> None:
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return
    if len(known) > 5000:  # as many points as the picture can show
        known = np.percentile(known, np.linspace(0, 100, 5000))
    parts = np.arange(1, len(known) + 1) / len(known)
    (line,) = axes.plot(known, parts, lw=1.4, label=label)
    p50, p99 = np.percentile(known, [50, 99])
    axes.plot([p50, p99], [0.5, 0.99], "o", color=line.get_color(), ms=4)
