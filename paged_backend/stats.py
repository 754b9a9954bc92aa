"""Numbers an engine reports about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class EngineStats:
    """The state of an engine now, and its totals since it started."""

    num_running: int
    num_waiting: int
    blocks_used: int
    blocks_total: int
    steps: int
    computed_tokens: int
    """Tokens run through the model, recomputation after preemption included."""
    output_tokens: int
    preemptions: int


@dataclass(slots=True, frozen=True)
class StepStats:
    """One step: how many rows and tokens it ran, how many tokens it sampled, and its wall time."""

    num_rows: int
    num_tokens: int
    output_tokens: int
    seconds: float
