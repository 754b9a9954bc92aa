"""Pictures of measurements. Needs matplotlib (`pip install paged-backend[bench]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paged_backend.figures import GRID, INK, figure, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from paged_backend.bench.peers import PeersResult
    from paged_backend.bench.scaling import Point

_OURS, _OTHERS = "#2f6f9f", ("#e3a857", "#b9b9b9", "#8fbcd9")


def write_peers(result: PeersResult, path: Path) -> None:
    """Tokens per second by workload, medians with each run as a dot, and seconds until ready."""
    title = f"{result.model}, {result.dtype}, {result.threads} threads of {result.machine.cpu}"
    made = figure(3.2 * (len(result.contests) + 1), 3.4, title)
    *rates, ready = made.subplots(1, len(result.contests) + 1)
    for axes, contest in zip(rates, result.contests, strict=True):
        _bars(axes, [(series.system, series.median_rate, series.rates) for series in contest.series])
        plain(axes, contest.workload, "", contest.unit)
    _bars(ready, [(name, seconds, []) for name, seconds in result.ready_seconds.items()])
    plain(ready, "start", "", "s until ready")
    save(made, path)


def write_scaling(points: Sequence[Point], title: str, path: Path) -> None:
    """Tokens per second by rows, and milliseconds a step by context; thinner lines are of fewer threads."""
    made = figure(9, 3.8, title)
    by_rows, by_context = made.subplots(1, 2)
    most = max(point.threads for point in points)
    for axes, name in ((by_rows, "context"), (by_context, "rows")):
        fixed = sorted({getattr(point, name) for point in points})
        for threads in sorted({point.threads for point in points}, reverse=True):
            for at, value in enumerate(fixed):
                line = [point for point in points if (point.threads, getattr(point, name)) == (threads, value)]
                style = {"color": f"C{at}", "lw": 1.6 if threads == most else 0.8, "marker": "o", "ms": 3}
                label = f"{value:,} {'tokens' if name == 'context' else 'rows'}" if threads == most else None
                if axes is by_rows:
                    xy = [(point.rows, point.tokens_per_second) for point in line]
                else:
                    xy = [(point.context, point.step_milliseconds) for point in line]
                axes.plot(*zip(*sorted(xy), strict=True), label=label, **style)
        axes.set_xscale("log", base=2)
        axes.grid(color=GRID)
        axes.legend(fontsize=7, frameon=False)
    threads_told = "" if most == 1 else f", thick {most} threads, thin fewer"
    plain(by_rows, "By rows and context" + threads_told, "rows", "output tok/s")
    plain(by_context, "By context and rows" + threads_told, "context", "ms a step")
    by_rows.set_ylim(bottom=0)
    by_context.set_yscale("log", base=2)
    for axis in (by_rows.xaxis, by_context.xaxis, by_context.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    save(made, path)


def _bars(axes: Axes, bars: Sequence[tuple[str, float, Sequence[float]]]) -> None:
    for at, (_, height, dots) in enumerate(bars):
        axes.bar(at, height, width=0.7, color=_OTHERS[(at - 1) % len(_OTHERS)] if at else _OURS)
        axes.plot([at] * len(dots), dots, "o", color=INK, ms=2.5, alpha=0.6)
        axes.annotate(
            f"{height:,.3g}" if height < 1000 else f"{height:,.0f}",
            (at, max([height, *dots])),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )
    axes.set_xticks(range(len(bars)), [name.replace(" ", "\n") for name, _, _ in bars])
    axes.margins(y=0.12)
