"""What happened when, in a bounded number of bins, and how full the memory was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BINS = 1024


@dataclass(slots=True)
class MemoryUse:
    """Time-weighted means over replicas, in tokens of KV, while a request waited because there was no room."""

    seconds: float = 0.0
    """Of all replicas together; 0 when there was always room."""
    capacity: float = 0.0
    used: float = 0.0
    """Hold K and V."""
    reserved: float = 0.0
    """Held by requests that will write them."""
    internal: float = 0.0
    """Held by requests that never write them."""
    running: float = 0.0
    """Requests in one replica."""

    @property
    def allocated(self) -> float:
        """Held by requests."""
        return self.used + self.reserved + self.internal

    @property
    def external(self) -> float:
        """Held by nobody, and no use to whoever waits: external fragmentation and others."""
        return self.capacity - self.allocated

    @property
    def waste(self) -> float:
        """Part of what is allocated that holds nothing."""
        return 1 - self.used / self.allocated if self.allocated else 0.0


class Timeline:
    """Integrals over time of six quantities, summed over replicas: in bins, in all, and while memory is full.

    Bins are joined in pairs whenever time runs past the last, so their number is bounded and their width fits.
    """

    NAMES = ("running", "waiting", "used", "reserved", "internal", "busy")

    def __init__(self, width: float = 1e-3) -> None:
        """`width` of the first bins, in seconds."""
        self._width = width
        self._bins = [[0.0] * 6 for _ in range(_BINS)]
        self._all, self._full = [0.0] * 6, [0.0] * 6

    def add(
        self, start: float, end: float, values: tuple[float, float, float, float, float, float], full: bool
    ) -> None:
        """From `start` to `end`, in seconds, one replica had these values, in the order of `NAMES`."""
        while end >= self._width * _BINS:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
            self._bins += [[0.0] * 6 for _ in range(_BINS - len(self._bins))]
            self._width *= 2
        running, waiting, used, reserved, internal, busy = values
        seconds = end - start
        for sums in (self._all, self._full) if full else (self._all,):
            sums[0] += running * seconds
            sums[1] += waiting * seconds
            sums[2] += used * seconds
            sums[3] += reserved * seconds
            sums[4] += internal * seconds
            sums[5] += busy * seconds
        index = int(start / self._width)
        while start < end:
            until = min(end, (index + 1) * self._width)
            seconds, sums = until - start, self._bins[index]
            sums[0] += running * seconds
            sums[1] += waiting * seconds
            sums[2] += used * seconds
            sums[3] += reserved * seconds
            sums[4] += internal * seconds
            sums[5] += busy * seconds
            start, index = until, index + 1

    def memory(self, capacity: int, full: bool = True) -> MemoryUse:
        """Means over the time that memory was full, or that any replica was busy; `capacity` tokens in each."""
        running, _, used, reserved, internal, seconds = self._full if full else self._all
        if not seconds:
            return MemoryUse(capacity=capacity)
        return MemoryUse(seconds, capacity, used / seconds, reserved / seconds, internal / seconds, running / seconds)

    @property
    def busy_seconds(self) -> float:
        """Of all replicas together."""
        return self._all[5]

    def series(self, end: float) -> tuple[npt.NDArray[np.float64], dict[str, npt.NDArray[np.float64]]]:
        """Middles of the bins up to `end`, in seconds, and the mean of each quantity in them."""
        count = min(_BINS, int(end / self._width) + 1)
        values = np.array(self._bins[:count]).T / self._width
        return (np.arange(count) + 0.5) * self._width, dict(zip(self.NAMES, values, strict=True))
