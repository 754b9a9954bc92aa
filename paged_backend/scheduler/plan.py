"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from paged_backend.kv_cache.moves import BlockMoves
from paged_backend.request import Request

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class StepPlan:
    """Row i is tokens `starts[i] .. starts[i] + counts[i]` of the request in `slots[i]`.

    Rows of one token come first. A row samples a token when it reaches the end of what its request has.
    """

    slots: npt.NDArray[np.int64] = field(default_factory=lambda: _NONE)
    starts: npt.NDArray[np.int64] = field(default_factory=lambda: _NONE)
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: _NONE)
    samples: npt.NDArray[np.bool_] = field(default_factory=lambda: _NONE.astype(np.bool_))
    sampling: list[Request] = field(default_factory=list)
    """The requests of the rows that sample, in order."""
    scoring: list[tuple[int, Request]] = field(default_factory=list)
    """Rows with tokens of prompts whose log-probabilities are asked for."""
    num_steps: int = 1
    """More than 1: every row decodes that many tokens, one after the other, and nothing else happens meanwhile."""
    loads: list[Request] = field(default_factory=list)
    """Requests whose batch-state rows must be filled: they are new in their slot, or their tokens were changed."""
    admitted: list[Request] = field(default_factory=list)
    """Requests that got a slot in this step."""
    preempted: list[Request] = field(default_factory=list)
    moves: BlockMoves = field(default_factory=BlockMoves)

    @property
    def num_tokens(self) -> int:
        """Tokens the model runs over in each of its `num_steps`."""
        return int(self.counts.sum())
