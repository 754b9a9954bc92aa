"""How steps of decodes take longer with rows and context, and shorter with threads, on a CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from paged_backend.bench.shapes import make_engine
from paged_backend.bench.step import Decodes
from paged_backend.config import EngineConfig

STEPS = 10
"""Timed at a point."""
MOST_TOKENS = 32_768
"""Rows times context of the largest point: more would take long to prefill."""


@dataclass(frozen=True, slots=True)
class Point:
    """Steps in which each of `rows` requests decodes one token."""

    threads: int
    rows: int
    context: int
    """Tokens of a row, as asked for."""
    mean_context: float
    """As measured: over rows and steps."""
    step_milliseconds: float
    """The median."""

    @property
    def tokens_per_second(self) -> float:
        """Of all rows."""
        return self.rows / self.step_milliseconds * 1e3


def grid(rows: Sequence[int], contexts: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and contexts of the points, the shortest first, without those above `MOST_TOKENS`."""
    every = [(row, context) for context in sorted(set(contexts)) for row in sorted(set(rows))]
    return [(row, context) for row, context in every if row * context <= MOST_TOKENS]


def measure(
    config: EngineConfig,
    threads: Sequence[int],
    points: Sequence[tuple[int, int]],
    report: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """Every point with every number of threads of `threads`, on one engine of `config`.

    Longer prompts begin with shorter ones: a prefix cache spares most of their prefill.

    Raises `InvalidArgument` for a context that the engine cannot do.
    """
    found = []
    before = torch.get_num_threads()
    engine = make_engine(config)
    try:
        for rows, context in points:
            report(f"{rows} x {context} tokens")
            load = Decodes(engine, rows, context)
            for count in threads:
                torch.set_num_threads(count)
                load.run(1)
                seconds = [load.run(1) for _ in range(STEPS)]
                length = statistics.mean(load.starts()) + 1 - (STEPS - 1) / 2
                found.append(Point(count, rows, context, length, statistics.median(seconds) * 1e3))
            torch.set_num_threads(before)
            load.end()
    finally:
        torch.set_num_threads(before)
        engine.close()
    return found
