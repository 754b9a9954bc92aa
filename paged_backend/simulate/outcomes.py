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
    """Where it was sent; -1 if it was too long for any."""
    started: npt.NDArray[np.float64]
    """Seconds at which it first got a slot; NaN if never."""
    first: npt.NDArray[np.float64]
    """Seconds at which its first token was there."""
    ended: npt.NDArray[np.float64]
    preemptions: npt.NDArray[np.int64]
    cached: npt.NDArray[np.int64]
    """Prompt tokens found in the cache at the first slot."""
    num_ended: int
    """Finished and refused ones, so far."""

    @classmethod
    def of(cls, trace: Trace, max_model_len: int) -> Outcomes:
        """Nothing has happened yet."""
        output = np.minimum(trace.output, max_model_len - trace.prompt)
        nothing, never = np.zeros(len(trace), dtype=np.int64), np.full(len(trace), np.nan)
        return cls(
            trace,
            output,
            refused=output < 1,
            replica=nothing - 1,
            started=never,
            first=never.copy(),
            ended=never.copy(),
            preemptions=nothing,
            cached=nothing.copy(),
            num_ended=int((output < 1).sum()),
        )

    @property
    def finished(self) -> npt.NDArray[np.bool_]:
        """Which requests got all their tokens."""
        ended: npt.NDArray[np.bool_] = ~np.isnan(self.ended)
        return ended

    @property
    def ttft(self) -> npt.NDArray[np.float64]:
        """Seconds from arrival to the first token."""
        return self.first - self.trace.arrival

    @property
    def tpot(self) -> npt.NDArray[np.float64]:
        """Mean seconds from token to token; NaN for outputs of one."""
        gaps = np.where(self.output > 1, self.output - 1, np.nan)
        seconds: npt.NDArray[np.float64] = (self.ended - self.first) / gaps
        return seconds

    @property
    def latency(self) -> npt.NDArray[np.float64]:
        """Seconds from arrival to the last token."""
        return self.ended - self.trace.arrival
