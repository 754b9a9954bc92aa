"""Sampling as the engine sees it: the plugs, and the random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from paged_kernels.sampling import SamplingBatch
from torch import Tensor

from paged_backend.request import Request


class Sampler(Protocol):
    """Made by the hook `paged_sampler`."""

    def __call__(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Token ids `[rows]` int64, on the device of the float32 `logits` `[rows, vocab]`."""
        ...


class LogitsProcessor(Protocol):
    """Made by the hook `paged_logits_processor`."""

    def __call__(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """Edit the float32 `logits` `[rows, vocab]` in place; row i belongs to `requests[i]`."""
        ...


def uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) from seed and position alone, so a request repeats its tokens whatever runs beside it.

    SplitMix64's finaliser (Steele et al., OOPSLA 2014), twice, over a counter.
    """
    state = _mix(seeds) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
