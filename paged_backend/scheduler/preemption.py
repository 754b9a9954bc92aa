"""Who is preempted, and whether its K and V are kept in host memory or computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from paged_backend.request import Request


@dataclass(slots=True)
class PreemptionCosts:
    """What the two ways cost, as measured so far."""

    seconds_per_token: float = 0.0
    """To compute one token of a prompt; 0 until it is known."""
    bytes_per_second: float = 0.0
    """Of copies between device and host; 0 when there is no host tier."""
    bytes_per_token: int = 0
    """K and V of one token."""

    def swap_is_cheaper(self, num_tokens: int) -> bool:
        """Whether two copies of that many tokens take less time than computing them; ties and the unknown: yes."""
        copies = 2 * num_tokens * self.bytes_per_token / self.bytes_per_second
        return self.seconds_per_token == 0.0 or copies <= num_tokens * self.seconds_per_token


class PreemptionPolicy(Protocol):
    """Made by the hook `paged_preemption_policy`."""

    def victim(self, candidates: Sequence[Request]) -> Request:
        """Whom to preempt; all of these rank below the request that needs room."""
        ...

    def swaps(self, num_tokens: int, costs: PreemptionCosts) -> bool:
        """Whether so many tokens of a victim, or of an evicted prefix, are kept in the host tier if that has room."""
        ...


class LowestRanked:
    """The request that the scheduling policy would run last is preempted, and kept in the host tier if `swap`.

    With `swap=None` the cheaper way is taken. So it is for evicted prefixes.
    """

    def __init__(self, swap: bool | None) -> None:
        self._swap = swap

    def victim(self, candidates: Sequence[Request]) -> Request:
        """See `PreemptionPolicy.victim`."""
        return max(candidates, key=lambda request: request.rank)

    def swaps(self, num_tokens: int, costs: PreemptionCosts) -> bool:
        """See `PreemptionPolicy.swaps`."""
        return costs.swap_is_cheaper(num_tokens) if self._swap is None else self._swap
