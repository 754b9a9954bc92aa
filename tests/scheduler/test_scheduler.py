"""The scheduler against random arrivals, aborts and steps, with tokens made up instead of a model."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.request import Request, RequestStatus, SamplingParams
from paged_backend.scheduler.policy import FirstComeFirstServed, SchedulingPolicy
from paged_backend.scheduler.scheduler import Scheduler, StepPlan


@dataclass
class Simulation:
    """A scheduler, the requests it was given, and what a model would have in its cache."""

    num_blocks: int = 20
    block_size: int = 4
    num_slots: int = 4
    budget: int = 16
    policy: SchedulingPolicy = field(default_factory=FirstComeFirstServed)

    def __post_init__(self) -> None:
        self.max_len = self.num_blocks * self.block_size
        self.tables = BlockTables(
            BlockPool(self.num_blocks),
            block_size=self.block_size,
            num_slots=self.num_slots,
            max_model_len=self.max_len,
        )
        self.scheduler = Scheduler(self.policy, self.tables, max_num_batched_tokens=self.budget)
        self.live: dict[str, Request] = {}
        self.written: dict[int, tuple[str, int]] = {}  # cache slot -> whose token, at which position
        self.arrivals = 0

    def add(self, prompt: int, output: int) -> Request:
        prompt = min(prompt, self.max_len - 1)
        request = Request(
            request_id=f"r{self.arrivals}",
            token_ids=[0] * prompt,
            num_prompt_tokens=prompt,
            params=SamplingParams(),
            max_total_tokens=min(prompt + output, self.max_len),
            stop_token_ids=frozenset(),
            seed=0,
            arrival_index=self.arrivals,
        )
        self.arrivals += 1
        self.live[request.request_id] = request
        self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        self.scheduler.remove(request)
        request.end("abort")
        del self.live[request.request_id]

    def step(self) -> StepPlan:
        before = {request_id: request.num_computed_tokens for request_id, request in self.live.items()}
        plan = self.scheduler.schedule()
        self.check(plan, before)
        for request, samples in zip(plan.requests, plan.samples, strict=True):
            if not samples:
                continue
            request.token_ids.append(0)
            if len(request.token_ids) == request.max_total_tokens:
                self.scheduler.remove(request)
                request.end("length")
                del self.live[request.request_id]
        self.tables.check()
        return plan

    def check(self, plan: StepPlan, before: dict[str, int]) -> None:
        self.tables.check()
        assert plan.num_tokens <= self.budget
        assert len({request.slot for request in plan.requests}) == len(plan.requests) <= self.num_slots
        assert [count > 1 for count in plan.counts] == sorted(count > 1 for count in plan.counts), "singles first"
        for request, start, count in zip(plan.requests, plan.starts, plan.counts, strict=True):
            assert count > 0
            assert start == (0 if request in plan.admitted else before[request.request_id])
            # Write the tokens, then read the whole context back: nobody else's token may be in it.
            for at in range(request.num_computed_tokens):
                block = int(self.tables.array[request.slot, at // self.block_size])
                where = block * self.block_size + at % self.block_size
                assert block > 0
                if at >= start:
                    self.written[where] = (request.request_id, at)
                else:
                    assert self.written[where] == (request.request_id, at)
        for request in self.live.values():
            running = request.status is RequestStatus.RUNNING
            assert running == (request.request_id in self.scheduler.running) == (request.slot >= 0)
        if not plan.requests:
            assert not self.live, "a step with work to do did none"

    def drain(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.live, "requests were lost or starved"
        assert self.tables.pool.num_free == self.num_blocks


class LongestFirst:
    """A policy unlike arrival order."""

    def key(self, request: Request) -> int:
        return -request.num_prompt_tokens


class ShortestFirst:
    """A policy whose first to go can be a decode older than the prefill it makes room for."""

    def key(self, request: Request) -> int:
        return request.num_prompt_tokens


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(1, 30),
    block_size=st.integers(1, 8),
    num_slots=st.integers(1, 6),
    extra_budget=st.integers(0, 40),
    policy=st.sampled_from([FirstComeFirstServed(), LongestFirst(), ShortestFirst()]),
)
def test_random_arrivals_aborts_and_steps(
    seed: int, num_blocks: int, block_size: int, num_slots: int, extra_budget: int, policy: SchedulingPolicy
) -> None:
    rng = random.Random(seed)
    if num_blocks * block_size < 2:
        num_blocks = 2
    simulation = Simulation(num_blocks, block_size, num_slots, budget=num_slots + extra_budget, policy=policy)
    for _ in range(60):
        action = rng.random()
        if action < 0.3:
            simulation.add(rng.randint(1, 60), rng.randint(1, 30))
        elif action < 0.4 and simulation.live:
            simulation.abort(rng.choice(list(simulation.live.values())))
        else:
            simulation.step()
    simulation.drain()


def test_a_long_prompt_does_not_stall_decodes() -> None:
    simulation = Simulation(num_blocks=100, budget=16)
    short = simulation.add(3, 50)
    simulation.step()
    long = simulation.add(200, 5)
    for _ in range(10):
        plan = simulation.step()
        assert plan.requests[0] is short
        assert plan.counts[0] == 1
        assert plan.requests[1] is long
        assert plan.counts[1] == 15


def test_preemption_takes_the_latest_and_it_resumes_first() -> None:
    simulation = Simulation(num_blocks=6, block_size=4, num_slots=3)
    first, second = simulation.add(8, 12), simulation.add(8, 8)
    third = simulation.add(4, 4)
    order: list[Request] = []
    while simulation.live:
        order += simulation.step().preempted
    assert order[0] is second
    assert first.num_preemptions == 0
    assert second.num_preemptions >= 1
    assert third.num_preemptions == 0
    assert second.end_time is not None
    assert third.end_time is not None
    assert second.end_time < third.end_time


def test_admission_leaves_running_requests_their_next_block() -> None:
    simulation = Simulation(num_blocks=4, block_size=4, num_slots=4)
    simulation.add(4, 4)
    simulation.add(8, 4)
    plan = simulation.step()
    assert [len(request.token_ids) for request in plan.requests] == [4 + 1], "2 + 3 blocks do not fit in 4"


def test_the_policy_orders_service_and_preemption() -> None:
    simulation = Simulation(num_slots=1, policy=LongestFirst())
    requests = [simulation.add(length, 2) for length in (5, 20, 9)]
    simulation.drain()
    ends = [request.end_time or 0.0 for request in requests]
    assert ends[1] < ends[2] < ends[0]


def test_a_request_that_ends_twice_is_an_error() -> None:
    request = Simulation().add(3, 3)
    request.end("length")
    with pytest.raises(RuntimeError, match="ended twice"):
        request.end("abort")
