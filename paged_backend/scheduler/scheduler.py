"""Iteration-level scheduling: every step mixes decodes with prefill chunks under one token budget.

Continuous batching is Orca's (Yu et al., OSDI 2022), chunked prefill is Sarathi-Serve's (Agrawal et al., OSDI 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.request import Request, RequestStatus
from paged_backend.scheduler.policy import SchedulingPolicy, WaitingQueue


@dataclass(slots=True)
class StepPlan:
    """What one step computes: row i is tokens `starts[i] .. starts[i] + counts[i]` of `requests[i]`.

    Rows of one token come first. A row samples a token when it reaches the end of what its request has.
    """

    requests: list[Request] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    """Requests that got a slot in this step: their batch-state rows must be loaded."""
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens the model runs over."""
        return sum(self.counts)


class Scheduler:
    """Owns the waiting and the running requests and decides each step. Single-threaded."""

    def __init__(self, policy: SchedulingPolicy, tables: BlockTables, *, max_num_batched_tokens: int) -> None:
        self.policy, self.tables = policy, tables
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting = WaitingQueue(policy)
        self.running: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.running) or len(self.waiting) > 0

    def add(self, request: Request) -> None:
        """Let a new request wait for its turn."""
        self.waiting.add(request)

    def remove(self, request: Request) -> None:
        """Forget a request that ended, and free what it holds."""
        if request.status is RequestStatus.RUNNING:
            del self.running[request.request_id]
            self._release(request)
        else:
            self.waiting.remove(request)

    def schedule(self) -> StepPlan:
        """Plan the next step and advance `num_computed_tokens` of its requests past it.

        Running requests come before waiting ones, and decodes before prefill chunks, so neither a long prompt nor
        a burst of arrivals stalls a running request.
        """
        plan = StepPlan()
        chosen: dict[str, int] = {}
        budget = self.max_num_batched_tokens
        # A decode has one token left, so this order puts decodes first and keeps admission order among prefills.
        for request in sorted(self.running.values(), key=lambda r: len(r.token_ids) - r.num_computed_tokens > 1):
            if request.request_id not in self.running:
                continue  # preempted below, for an earlier one
            count = min(len(request.token_ids) - request.num_computed_tokens, budget)
            if count > 0 and self._make_room(request, request.num_computed_tokens + count, plan):
                chosen[request.request_id] = count
                budget -= count
        for request in plan.preempted:
            budget += chosen.pop(request.request_id, 0)
        if not plan.preempted:
            self._admit_waiting(budget, chosen, plan)
        for request_id, count in sorted(chosen.items(), key=lambda item: item[1] > 1):
            request = self.running[request_id]
            plan.requests.append(request)
            plan.starts.append(request.num_computed_tokens)
            plan.counts.append(count)
            request.num_computed_tokens += count
            plan.samples.append(request.num_computed_tokens == len(request.token_ids))
        return plan

    def _admit_waiting(self, budget: int, chosen: dict[str, int], plan: StepPlan) -> None:
        """Start waiting requests while each fits as a whole and every running one keeps room for its next token."""
        tables = self.tables
        spare = tables.pool.num_free - sum(self._missing(request) for request in self.running.values())
        while budget > 0 and tables.num_free_slots and (request := self.waiting.peek()) is not None:
            spare -= tables.blocks_for(len(request.token_ids) + 1)
            if spare < 0:
                return
            self.waiting.remove(request)
            request.slot = tables.take_slot()
            request.status = RequestStatus.RUNNING
            self.running[request.request_id] = request
            plan.admitted.append(request)
            chosen[request.request_id] = count = min(len(request.token_ids), budget)
            tables.grow(request.slot, count)
            budget -= count

    def _missing(self, request: Request) -> int:
        """Blocks a running request still has to take for its tokens and the next one."""
        return max(0, self.tables.blocks_for(len(request.token_ids) + 1) - self.tables.num_owned(request.slot))

    def preempt_all(self) -> None:
        """Send every running request back to the queue, as after a step that never ended."""
        for request in list(self.running.values()):
            self._preempt(request, StepPlan())

    def _make_room(self, request: Request, num_tokens: int, plan: StepPlan) -> bool:
        """Grow the request's table, preempting by recompute until it fits; False if the request itself had to go."""
        while not self.tables.grow(request.slot, num_tokens):
            victim = max(self.running.values(), key=lambda r: (self.policy.key(r), r.arrival_index))
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, plan: StepPlan) -> None:
        del self.running[request.request_id]
        self._release(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.waiting.add(request)
        plan.preempted.append(request)

    def _release(self, request: Request) -> None:
        self.tables.release(request.slot)
        request.slot = -1
