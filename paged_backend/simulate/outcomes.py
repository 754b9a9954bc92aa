"""What became of each request of a trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paged_backend.simulate.trace import Trace


@dataclass(slots=True)
class Outcomes:
    """Arrays by request, in the order of the trace."""

    trace: Trace
    output: npt.NDArray[np.int64]
    """Tokens generated: those of the trace, as far as the model's context allows."""
    refused: npt.NDArray[np.bool_]
    """It was too long for the replica, or the waiting queue was full."""
    replica: npt.NDArray[np.int64]
    started: npt.NDArray[np.float64]
    """Seconds at which it first got a slot; NaN if never."""
    first: npt.NDArray[np.float64]
    """Seconds at which its first token was there."""
    ended: npt.NDArray[np.float64]
    preemptions: npt.NDArray[np.int64]
    cached: npt.NDArray[np.int64]
    """Prompt tokens found in the cache at the first slot."""
    num_ended: int = 0
    """Finished and refused ones."""

    @classmethod
    def of(cls, trace: Trace, max_model_len: int) -> Outcomes:
        """Nothing has happened yet."""
        count = len(trace)
        times = [np.full(count, np.nan) for _ in range(3)]
        counts = [np.zeros(count, dtype=np.int64) for _ in range(3)]
        output = np.minimum(trace.output, max_model_len - trace.prompt)
        return cls(trace, output, output < 1, counts[0], *times, counts[1], counts[2])

    @property
    def finished(self) -> npt.NDArray[np.bool_]:
        """Which requests got all their tokens."""
        return ~np.isnan(self.ended)

    @property
    def ttft(self) -> npt.NDArray[np.float64]:
        """Seconds from arrival to the first token."""
        return self.first - self.trace.arrival

    @property
    def tpot(self) -> npt.NDArray[np.float64]:
        """Mean seconds from token to token; NaN for outputs of one."""
        gaps = np.where(self.output > 1, self.output - 1, np.nan)
        return (self.ended - self.first) / gaps

    @property
    def latency(self) -> npt.NDArray[np.float64]:
        """Seconds from arrival to the last token."""
        return self.ended - self.trace.arrival
