"""Which replica a request goes to."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import numpy as np
import numpy.typing as npt

from paged_backend.request import Request


class Fleet:
    """What a router knows of the replicas: what it sent them, and what of it has ended."""

    def __init__(self, num_replicas: int) -> None:
        self.requests: npt.NDArray[np.int64] = np.zeros(num_replicas, dtype=np.int64)
        """Requests each replica has and has not ended."""
        self.tokens: npt.NDArray[np.int64] = np.zeros(num_replicas, dtype=np.int64)
        """Tokens of those requests, prompt and longest output."""

    def __len__(self) -> int:
        return len(self.requests)


class Router(Protocol):
    """Made by the hook `paged_router`."""

    def choose(self, request: Request, fleet: Fleet) -> int:
        """The index of the replica that gets the request. `request.block_hashes` name what its prompt begins with."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, fleet: Fleet) -> int:
        """See `Router.choose`."""
        chosen = self._next % len(fleet)
        self._next = chosen + 1
        return chosen


class LeastLoaded:
    """The replica with the fewest outstanding tokens."""

    def choose(self, request: Request, fleet: Fleet) -> int:
        """See `Router.choose`."""
        return int(fleet.tokens.argmin())


class PrefixAffinity:
    """The replica that last got the longest known beginning of the prompt, unless others have much less to do.

    That is when it has more than `factor` times the outstanding tokens of the least loaded replica, and the prompt
    besides: then that one gets the request, and the prefix with it. What is known of is bounded: the beginnings used
    longest ago are forgotten.
    """

    def __init__(self, factor: float = 1.5, max_blocks: int = 1_000_000) -> None:
        self._factor, self._max_blocks = factor, max_blocks
        self._homes: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, request: Request, fleet: Fleet) -> int:
        """See `Router.choose`."""
        chosen = int(fleet.tokens.argmin())
        homes = self._homes
        home = next((homes[name] for name in reversed(request.block_hashes) if name in homes), None)
        if home is not None and fleet.tokens[home] <= self._factor * fleet.tokens[chosen] + request.max_total_tokens:
            chosen = home
        for name in request.block_hashes:
            homes[name] = chosen
            homes.move_to_end(name)
        while len(homes) > self._max_blocks:
            homes.popitem(last=False)
        return chosen
