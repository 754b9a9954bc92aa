"""What must happen to blocks on the device before a step computes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class BlockMoves:
    """Done in this order, so that each reads what it was planned to read."""

    stores: list[tuple[int, int]] = field(default_factory=list)
    """Device block to host block."""
    clears: list[int] = field(default_factory=list)
    """Device blocks to fill with zeros."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Device block to device block."""
    fetches: list[tuple[int, int]] = field(default_factory=list)
    """Host block to device block."""
