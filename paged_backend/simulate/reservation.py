"""What was before paging: each request reserves one contiguous extent for as long as it may get.

The three ways of the vLLM paper (arXiv 2309.06180, section 6.1): the longest request there can be (Orca (Max)), the
prompt and the next power of two of the output (Orca (Pow2)), and pages. Extents are placed by a buddy allocator, as
the paper assumes of Orca, or first fit, which wastes less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.request import Request
from paged_backend.scheduler.plan import StepPlan
from paged_backend.scheduler.policy import SchedulingPolicy
from paged_backend.scheduler.preemption import PreemptionPolicy
from paged_backend.scheduler.scheduler import Scheduler
from paged_backend.simulate.names import CONTIGUOUS_MAX


def reserved_tokens(mode: str, request: Request, max_model_len: int) -> int:
    """Tokens that a request reserves; the length of its output is known, which favours the old ways."""
    if mode == CONTIGUOUS_MAX:
        return max_model_len
    output = request.max_total_tokens - request.num_prompt_tokens
    return min(max_model_len, request.num_prompt_tokens + (1 << (output - 1).bit_length()))


class ExtentAllocator(Protocol):
    """Places extents of blocks in a memory."""

    def allocate(self, size: int) -> int | None:
        """The first block of a free extent; None when there is none so long."""
        ...

    def free(self, start: int, size: int) -> None:
        """Give back what `allocate(size)` returned."""
        ...


class FirstFit:
    """The lowest hole that is long enough; neighbouring holes are one."""

    def __init__(self, num_blocks: int) -> None:
        self._holes = [(0, num_blocks)]
        """(start, end), in order, never touching."""

    def allocate(self, size: int) -> int | None:
        """See `ExtentAllocator.allocate`."""
        for index, (start, end) in enumerate(self._holes):
            if end - start >= size:
                self._holes[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def free(self, start: int, size: int) -> None:
        """See `ExtentAllocator.free`."""
        end = start + size
        at = next((i for i, hole in enumerate(self._holes) if hole[0] >= end), len(self._holes))
        upper = at
        if at < len(self._holes) and self._holes[at][0] == end:
            end, upper = self._holes[at][1], at + 1
        if at and self._holes[at - 1][1] == start:
            at -= 1
            start = self._holes[at][0]
        self._holes[at:upper] = [(start, end)]


class Buddy:
    """Extents of powers of two, halved when too long and joined with their other half when both are free."""

    def __init__(self, num_blocks: int) -> None:
        self._free: list[set[int]] = [set() for _ in range(num_blocks.bit_length())]
        start = 0
        for order in reversed(range(num_blocks.bit_length())):  # a memory of any size is a row of powers of two
            if num_blocks >> order & 1:
                self._free[order].add(start)
                start += 1 << order

    def allocate(self, size: int) -> int | None:
        """See `ExtentAllocator.allocate`."""
        wanted = (size - 1).bit_length()
        order = next((order for order in range(wanted, len(self._free)) if self._free[order]), None)
        if order is None:
            return None
        start = min(self._free[order])
        self._free[order].remove(start)
        while order > wanted:
            order -= 1
            self._free[order].add(start + (1 << order))
        return start

    def free(self, start: int, size: int) -> None:
        """See `ExtentAllocator.free`."""
        order = (size - 1).bit_length()
        while start ^ (1 << order) in self._free[order]:
            self._free[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)


class ReservingTables(BlockTables):
    """Gives a slot all its blocks at once, if there is a contiguous extent for them.

    Which blocks of the pool they are called does not matter; where they lie, the allocator knows.
    """

    def __init__(
        self, pool: BlockPool, allocator: ExtentAllocator, *, block_size: int, num_slots: int, max_model_len: int
    ) -> None:
        super().__init__(pool, block_size=block_size, num_slots=num_slots, max_model_len=max_model_len)
        self._allocator = allocator
        self._extents: dict[int, tuple[int, int]] = {}
        self._next: tuple[int, int] | None = None

    def reserve(self, num_tokens: int) -> bool:
        """Find the extent of the next slot that is taken; False when there is none."""
        size = self.blocks_for(num_tokens)
        start = self._allocator.allocate(size) if size <= self.pool.num_free else None
        self._next = None if start is None else (start, size)
        return start is not None

    def cancel(self) -> None:
        """No slot was taken."""
        if self._next is not None:
            self._allocator.free(*self._next)
            self._next = None

    def adopt(self, slot: int, blocks: npt.NDArray[np.int32]) -> None:
        """Put the reserved extent into a new slot."""
        assert self._next is not None, "a slot was taken without a reservation"
        assert not blocks.size, "extents are not shared"
        self._extents[slot], self._next = self._next, None
        grown = self.grow(slot, self._extents[slot][1] * self.block_size)
        assert grown, "the pool has less room than the allocator"

    def release(self, slot: int) -> None:
        """See `BlockTables.release`."""
        self._allocator.free(*self._extents.pop(slot))
        super().release(slot)


class ReservingScheduler(Scheduler):
    """Admits a request only where its whole extent fits."""

    def __init__(
        self,
        policy: SchedulingPolicy,
        tables: ReservingTables,
        *,
        size: Callable[[Request], int],
        max_num_batched_tokens: int,
        max_prefill_tokens: int,
        preemption: PreemptionPolicy,
    ) -> None:
        """`size` says how many tokens a request reserves."""
        super().__init__(
            policy,
            tables,
            max_num_batched_tokens=max_num_batched_tokens,
            max_prefill_tokens=max_prefill_tokens,
            preemption=preemption,
        )
        self._reserving, self._size = tables, size

    def _admit(self, request: Request, budget: int, spare: int, plan: StepPlan) -> tuple[int, int] | None:
        if not self._reserving.reserve(self._size(request)):
            return None
        admitted = super()._admit(request, budget, spare, plan)
        self._reserving.cancel()  # does nothing when the slot has it
        return admitted
