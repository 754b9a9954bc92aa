"""Where the time of a start goes."""

from __future__ import annotations

import time


class Laps:
    """Seconds from one call to the next, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """What has been done since the last call, or since this was made, was `name`."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now

    def __str__(self) -> str:
        """`4.2 s (weights 1.0, model 3.2)`."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({parts})"
