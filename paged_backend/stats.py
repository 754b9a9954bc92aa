"""Numbers an engine reports about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class EngineStats:
    """The state of an engine now, and its totals since it started."""

    num_running: int
    num_waiting: int
    blocks_used: int
    """Held by requests."""
    blocks_cached: int
    """Held by nobody, but of content that can be found; used, cached and free blocks are all there are."""
    blocks_total: int
    block_size: int
    """Tokens of a block."""
    steps: int
    computed_tokens: int
    """Tokens run through the model, recomputation after preemption included."""
    cached_tokens: int
    """Prompt tokens found in the cache instead."""
    queried_tokens: int
    """Prompt tokens looked for in the cache."""
    output_tokens: int
    preemptions: int
    swapped: int
    """Preemptions whose blocks were kept in host memory."""
    blocks_stored: int
    """Copied to host memory."""
    blocks_fetched: int
    """Copied back."""


@dataclass(slots=True, frozen=True)
class StepStats:
    """One step: how many rows and tokens it ran, how many tokens it sampled, and its wall time."""

    num_rows: int
    num_tokens: int
    output_tokens: int
    seconds: float
    token_gaps: list[float]
    """Seconds since the token before, of each token that is not the first of its request."""
