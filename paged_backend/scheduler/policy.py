"""Order of service. A policy gives requests keys; the smallest runs first and the largest is preempted first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, Protocol

from paged_backend.request import Request


class SchedulingPolicy(Protocol):
    """Made by the hook `paged_scheduling_policy`."""

    def key(self, request: Request) -> Any:
        """A value ordered by `<`, fixed while the request waits or runs; ties go to the earlier arrival."""
        ...


class FirstComeFirstServed:
    """Requests run in order of arrival; the latest is preempted first."""

    def key(self, request: Request) -> int:
        """The arrival number."""
        return request.arrival_index


class WaitingQueue:
    """Requests without a slot, smallest key first. Add and pop are logarithmic; removal is lazy."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._heap: list[tuple[Any, int, Request]] = []
        self._members: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members.values())

    def add(self, request: Request) -> None:
        """Let the request wait."""
        heapq.heappush(self._heap, (self._policy.key(request), request.arrival_index, request))
        self._members[request.request_id] = request

    def peek(self) -> Request | None:
        """The next request to run, left in the queue."""
        while self._heap and not self._waits(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def remove(self, request: Request) -> None:
        """Take the request out, wherever it stands."""
        del self._members[request.request_id]
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [entry for entry in self._heap if self._waits(entry[2])]
            heapq.heapify(self._heap)

    def _waits(self, request: Request) -> bool:
        return self._members.get(request.request_id) is request
