"""Order of service: which waiting request runs next, and who makes room for whom."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from paged_backend.request import Request

_MOST_TENANTS = 4096
_CREDIT = 4096
"""Tokens by which a tenant that was idle may go before its turn: its requests come in bursts, its share is a mean."""


class SchedulingPolicy:
    """First come, first served. Subclasses, made by the hook `paged_scheduling_policy`, give another order.

    The request with the smallest key runs first; those with larger keys are preempted for it when blocks run out.
    """

    def key(self, request: Request) -> Any:
        """A value ordered by `<`, asked each time a request begins to wait; ties go to the earlier arrival."""
        return request.arrival_index

    def displaces(self, waiting: Request, running: Request) -> bool:
        """Whether a waiting request that finds no room may take that of a running one that ranks behind it."""
        return False

    def started(self, request: Request) -> None:
        """A request got a slot."""

    def served(self, request: Request, num_tokens: int) -> None:
        """The step being planned computes so many tokens of a prompt. Its request's `sort_key` may change now."""

    def stopped(self, request: Request) -> None:
        """A request gave its slot back: it is about to end, or was preempted."""

    def ended(self, request: Request) -> None:
        """A request left for good, from a slot or from the queue."""


class Priority(SchedulingPolicy):
    """Smaller `priority` first, and each second of waiting worth `1 / ageing_seconds` levels, so nothing starves.

    A more urgent request takes the room of less urgent ones, but never of one whose wait has made it as urgent.
    """

    def __init__(self, ageing_seconds: float) -> None:
        self._ageing_seconds = ageing_seconds

    def key(self, request: Request) -> float:
        """Linear ageing of everybody alike leaves the order fixed from the arrival on."""
        return request.priority * self._ageing_seconds + request.arrival_time

    def displaces(self, waiting: Request, running: Request) -> bool:
        """See `SchedulingPolicy.displaces`."""
        return waiting.priority < running.priority


class ShortestRemaining(SchedulingPolicy):
    """Fewest tokens left to compute first, with the same ageing: a second of waiting is worth `tokens_per_second`."""

    def __init__(self, tokens_per_second: float) -> None:
        self._tokens_per_second = tokens_per_second

    def key(self, request: Request) -> float:
        """Tokens of the prompt and what it has not generated yet, at most."""
        return request.max_total_tokens - request.num_output_tokens + request.arrival_time * self._tokens_per_second


class FairShare(SchedulingPolicy):
    """Start-time fair queueing over tenants (Goyal et al., SIGCOMM 1996), by tokens, and equal shares of the slots.

    A tenant's requests start one after the other on a virtual clock, each taking as long as it has tokens. The packets
    of the original are the chunks of prompts: the clock stands where the chunk served last started, and a request moves
    back with each of its chunks, so a long prompt that was begun holds up nobody. A tenant that sends little is served
    as if it were alone with each of the others, whatever they send, and may send a few requests at once. A request is
    charged for its longest output until it stops, then for what it used.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._finish: dict[str, float] = {}
        """Where each tenant's last request ends on the clock. Of very many, those that owe least are forgotten."""
        self._running: Counter[str] = Counter()

    def key(self, request: Request) -> float:
        """The virtual time at which the request starts, or goes on when it was preempted."""
        if request.sort_key is None:
            start = max(self._clock - _CREDIT, self._finish.get(request.tenant, -math.inf))
            self._finish[request.tenant] = start + request.max_total_tokens
            if len(self._finish) > _MOST_TENANTS:
                self._finish = dict(heapq.nlargest(_MOST_TENANTS // 2, self._finish.items(), key=lambda item: item[1]))
            return start
        return float(request.sort_key)

    def displaces(self, waiting: Request, running: Request) -> bool:
        """A tenant with fewer running requests takes a slot of one with at least two more."""
        return self._running[waiting.tenant] + 1 < self._running[running.tenant]

    def started(self, request: Request) -> None:
        """See `SchedulingPolicy.started`."""
        self._running[request.tenant] += 1
        self._clock = max(self._clock, float(request.sort_key))

    def served(self, request: Request, num_tokens: int) -> None:
        """See `SchedulingPolicy.served`."""
        self._clock = max(self._clock, float(request.sort_key))
        request.sort_key += num_tokens

    def stopped(self, request: Request) -> None:
        """See `SchedulingPolicy.stopped`."""
        self._running[request.tenant] -= 1
        if not self._running[request.tenant]:
            del self._running[request.tenant]

    def ended(self, request: Request) -> None:
        """Refund what it was charged and did not use."""
        finish = self._finish.get(request.tenant, 0.0) - (request.max_total_tokens - len(request.token_ids))
        if finish > self._clock - _CREDIT:
            self._finish[request.tenant] = finish
        else:
            self._finish.pop(request.tenant, None)  # as if it had never sent anything


class WaitingQueue:
    """Requests without a slot, smallest key first. Add and pop are logarithmic; removal is lazy."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._heap: list[tuple[Any, int, int, Request]] = []
        self._members: dict[Request, int] = {}
        """The number of the entry that counts."""
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request: Request) -> bool:
        return request in self._members

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members)

    def add(self, request: Request) -> None:
        """Let the request wait. All beams of a search keep the key of the first."""
        if request.sort_key is None or not request.steered:
            request.sort_key = self._policy.key(request)
        self._members[request] = number = next(self._numbers)
        heapq.heappush(self._heap, (*request.rank, number, request))

    def peek(self) -> Request | None:
        """The next request to run, left in the queue."""
        while self._heap and not self._waits(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][3] if self._heap else None

    def remove(self, request: Request) -> None:
        """Take the request out, wherever it stands."""
        del self._members[request]
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [entry for entry in self._heap if self._waits(entry)]
            heapq.heapify(self._heap)

    def _waits(self, entry: tuple[Any, int, int, Request]) -> bool:
        return self._members.get(entry[3]) == entry[2]
