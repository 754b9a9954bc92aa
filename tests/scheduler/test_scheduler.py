"""The scheduler against random arrivals, aborts and steps, on a toy model whose memory is watched."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_backend.kv_cache.groups import KVGroup
from paged_backend.request import Request
from paged_backend.scheduler.policy import FairShare, Priority, SchedulingPolicy, ShortestRemaining
from paged_backend.scheduler.preemption import LowestRanked
from tests.scheduler.toy import VOCAB, Toy

FULL, WINDOW, CHUNK = KVGroup(), KVGroup(window=6), KVGroup(chunk=8)


class LongestFirst(SchedulingPolicy):
    """A policy unlike arrival order."""

    def key(self, request: Request) -> int:
        return -request.num_prompt_tokens


class ShortestFirst(SchedulingPolicy):
    """A policy whose first to go can be a decode older than the prefill it makes room for."""

    def key(self, request: Request) -> int:
        return request.num_prompt_tokens


POLICIES = [
    SchedulingPolicy,
    LongestFirst,
    ShortestFirst,
    FairShare,
    lambda: Priority(ageing_seconds=0.001),
    lambda: ShortestRemaining(tokens_per_second=1.0),
]


def play(toy: Toy, rng: random.Random, operations: int, at_most: int = 40) -> None:
    """Random operations, deadlines among them, with prompts that share beginnings; then all the rest of the work."""
    families = [[rng.randrange(VOCAB) for _ in range(60)] for _ in range(3)]
    deadlines: dict[Request, int] = {}
    for _ in range(operations):
        for request in [request for request, at in deadlines.items() if at <= toy.steps]:
            del deadlines[request]
            if not request.ended:
                toy.abort(request)
        action = rng.random()
        if action < 0.3 and len(toy.live) < at_most:
            prompt = rng.choice(families)[: rng.randint(0, 60)] + [
                rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))
            ]
            request = toy.add(
                prompt,
                rng.randint(1, 30),
                salt=rng.choice(["", "", "other"]),
                tenant=rng.choice("abc"),
                priority=rng.randint(0, 2),
            )
            if rng.random() < 0.2:
                deadlines[request] = toy.steps + rng.randint(0, 40)
        elif action < 0.4 and toy.live:
            toy.abort(rng.choice(list(toy.live.values())))
        elif action < 0.41:
            toy.scheduler.prefix_cache.reset()
        else:
            toy.step()
    toy.drain()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(1, 40),
    block_size=st.integers(1, 8),
    num_slots=st.integers(1, 6),
    extra_budget=st.integers(0, 40),
    prefill=st.none() | st.integers(1, 20),
    policy=st.sampled_from(POLICIES),
    groups=st.sampled_from([(FULL,), (WINDOW,), (FULL, WINDOW), (FULL, WINDOW, WINDOW), (CHUNK, FULL)]),
    host_blocks=st.sampled_from([0, 3, 30]),
    swap=st.booleans(),
    lag=st.sampled_from([0, 0, 1]),
)
def test_random_arrivals_aborts_and_steps(
    seed: int,
    num_blocks: int,
    block_size: int,
    num_slots: int,
    extra_budget: int,
    prefill: int | None,
    policy: type[SchedulingPolicy],
    groups: tuple[KVGroup, ...],
    host_blocks: int,
    swap: bool,
    lag: int,
) -> None:
    num_blocks = max(num_blocks, len(groups) * -(-2 // block_size))
    toy = Toy(
        num_blocks,
        block_size,
        num_slots,
        budget=num_slots + extra_budget,
        prefill=prefill,
        policy=policy(),
        groups=groups,
        host_blocks=host_blocks,
        preemption=LowestRanked(swap),
        lag=lag,
    )
    play(toy, random.Random(seed), 60)


def test_nothing_leaks_in_100_000_operations() -> None:
    toy = Toy(
        num_blocks=60,
        num_slots=8,
        budget=24,
        prefill=16,
        policy=FairShare(),
        groups=(FULL, WINDOW),
        host_blocks=40,
    )
    toy.tables.check = lambda: None  # type: ignore[method-assign]
    rng = random.Random(5)
    for _ in range(100):
        play(toy, rng, 1000, at_most=20)
        type(toy.tables).check(toy.tables)
    assert toy.scheduler.num_preempted > 100
    assert toy.scheduler.num_swapped > 100
    assert toy.scheduler.num_cached_tokens > 1000
    assert toy.tables.pool.num_cached > 0
    toy.scheduler.prefix_cache.reset()
    assert toy.tables.pool.num_cached == 0


def test_a_long_prompt_does_not_stall_decodes() -> None:
    toy = Toy(num_blocks=100, budget=16)
    short = toy.add(3, 50)
    toy.step()
    long = toy.add(200, 5)
    for _ in range(10):
        plan = toy.step()
        assert plan.slots.tolist() == [short.slot, long.slot]
        assert plan.counts.tolist() == [1, 15]


def test_prompt_tokens_beside_decodes_are_bounded_apart_from_the_budget() -> None:
    toy = Toy(num_blocks=100, budget=64, prefill=8)
    toy.add(20, 50)
    assert toy.step().counts.tolist() == [20], "nothing decodes yet"
    toy.add(30, 5)
    assert [toy.step().counts.tolist() for _ in range(5)] == [[1, 8]] * 3 + [[1, 6], [1, 1]]


def test_preemption_takes_the_latest_and_it_resumes_first() -> None:
    toy = Toy(num_blocks=6, block_size=4, num_slots=3)
    first, second = toy.add(8, 12), toy.add(8, 8)
    third = toy.add(4, 4)
    order: list[Request] = []
    while toy.live:
        order += toy.step().preempted
    assert order[0] is second
    assert first.num_preemptions == 0
    assert second.num_preemptions >= 1
    assert third.num_preemptions == 0
    assert second.end_time is not None
    assert third.end_time is not None
    assert second.end_time < third.end_time


def test_admission_leaves_running_requests_their_next_block() -> None:
    toy = Toy(num_blocks=4, block_size=4, num_slots=4)
    toy.add(4, 4)
    toy.add(8, 4)
    assert len(toy.step().slots) == 1, "2 + 3 blocks do not fit in 4"


def test_the_policy_orders_service_and_preemption() -> None:
    toy = Toy(num_slots=1, policy=LongestFirst())
    requests = [toy.add(length, 2) for length in (5, 20, 9)]
    toy.drain()
    ends = [request.end_time or 0.0 for request in requests]
    assert ends[1] < ends[2] < ends[0]


def test_a_request_that_ends_twice_is_an_error() -> None:
    request = Toy().add(3, 3)
    request.end("length")
    with pytest.raises(RuntimeError, match="ended twice"):
        request.end("abort")


# ---- sharing


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    toy = Toy(num_blocks=50, budget=100, num_slots=4)
    prompt = [1, 2, 3, 4] * 5 + [2]
    requests = [toy.add(prompt, 3) for _ in range(4)]
    plan = toy.step()
    assert sorted(plan.counts.tolist()) == [1, 1, 1, 21]
    assert [request.num_cached_tokens for request in requests] == [0, 20, 20, 20]
    assert toy.tables.pool.num_used == 5 + 4, "five shared blocks, and one each"
    toy.drain()
    assert toy.tables.pool.num_cached == 5


def test_a_prompt_that_is_cached_whole_computes_its_last_token() -> None:
    toy = Toy(num_blocks=50, budget=100)
    prompt = [1, 2, 3, 4] * 5
    toy.add(prompt, 9)
    toy.drain()
    again = toy.add(prompt, 9)
    toy.step()
    assert again.num_cached_tokens == 16, "the last block, so that there are logits"
    longer = toy.add([*prompt, *again.token_ids[20:], 3], 1)
    toy.step()
    assert longer.num_cached_tokens == 20


def test_a_salt_keeps_tenants_apart() -> None:
    toy = Toy(num_blocks=50, budget=100)
    mine, yours, mine_again = (toy.add([1] * 20, 2, salt=salt) for salt in ("me", "you", "me"))
    toy.drain()
    assert [request.num_cached_tokens for request in (mine, yours, mine_again)] == [0, 0, 16]


def test_the_end_of_the_oldest_prefix_is_evicted_first() -> None:
    toy = Toy(num_blocks=12, budget=100)
    for token in (1, 2, 3):
        toy.add([token] * 20, 1)
        toy.drain()
    cached = []
    for token in (2, 1):
        cached.append(toy.add([token] * 20, 1))
        toy.drain()
    assert cached[0].num_cached_tokens == 16
    assert 0 < (cached[1].num_cached_tokens or 0) < 16


def test_a_window_keeps_only_its_own_blocks() -> None:
    full, hybrid = (Toy(num_blocks=400, budget=8, groups=groups) for groups in ((FULL, FULL), (FULL, WINDOW)))
    for toy in (full, hybrid):
        toy.add(100, 100)
        for _ in range(100):
            toy.step()
    assert full.tables.pool.num_used == 2 * 47
    assert hybrid.tables.pool.num_used == 47 + 3


def test_windowed_prefixes_need_only_their_window() -> None:
    toy = Toy(num_blocks=40, budget=100, groups=(FULL, WINDOW))
    toy.add([1, 2, 3, 4] * 5, 1)
    toy.drain()
    again = toy.add([*[1, 2, 3, 4] * 5, 4, 4], 9)
    toy.step()
    assert again.num_cached_tokens == 20
    held = toy.tables.array[:, again.slot, :6] > 0
    assert held.tolist() == [[True] * 6, [False, False, False, True, True, True]]


# ---- preemption


@pytest.mark.parametrize("swap", [True, False])
def test_a_preempted_request_comes_back_through_the_host_or_is_computed_again(swap: bool) -> None:
    toy = Toy(num_blocks=10, block_size=4, num_slots=2, budget=40, host_blocks=8, preemption=LowestRanked(swap))
    toy.add([1, 2, 3] * 5, 20)
    second = toy.add([2, 3, 4] * 5, 20)
    fetched = 0
    while toy.live:
        plan = toy.step()
        fetched += len(plan.moves.fetches)
    assert second.num_preemptions > 0
    assert (toy.scheduler.num_swapped > 0) == swap
    if swap:
        assert fetched > 0


def test_evicted_prefixes_get_a_second_chance_in_the_host_tier() -> None:
    toy = Toy(num_blocks=8, budget=100, num_slots=1, host_blocks=30)
    for token in (1, 2, 3, 1):
        request = toy.add([token] * 20, 4)
        toy.drain()
    assert request.num_cached_tokens == 16
    assert toy.host is not None
    assert toy.host.num_fetched > 0


# ---- policies


def test_priority_displaces_and_ages() -> None:
    toy = Toy(num_slots=1, policy=Priority(ageing_seconds=1000))
    low = toy.add(4, 20, priority=1)
    toy.step()
    high = toy.add(4, 2, priority=0)
    assert toy.step().preempted == [low]
    assert high.slot >= 0
    toy.drain()
    aged = Toy(num_slots=1, policy=Priority(ageing_seconds=10))
    patient = aged.add(4, 20, priority=1, arrival_time=time.monotonic() - 60)
    aged.scheduler.waiting.remove(patient)
    aged.scheduler.waiting.add(patient)
    aged.step()
    aged.add(4, 2, priority=0)
    assert aged.step().preempted == [], "a minute of waiting is worth six levels"


def test_shortest_remaining_goes_first() -> None:
    toy = Toy(num_slots=1, policy=ShortestRemaining(tokens_per_second=0))
    toy.add(4, 2)
    toy.step()
    long, short = toy.add(8, 30), toy.add(8, 5)
    toy.drain()
    assert (short.end_time or 0) < (long.end_time or 0)


def test_fair_share_serves_a_quiet_tenant_beside_a_noisy_one() -> None:
    toy = Toy(num_blocks=60, num_slots=4, policy=FairShare())
    noisy = [toy.add(20, 20, tenant="noisy") for _ in range(30)]
    for _ in range(10):
        toy.step()
    quiet = toy.add(8, 4, tenant="quiet")
    toy.step()
    assert quiet.slot >= 0, "it takes a slot at once"
    assert sum(request.slot >= 0 for request in noisy) == 3
    toy.drain()
    assert sum((request.end_time or 0) < (quiet.end_time or 0) for request in noisy) < 4


def test_fair_share_gives_two_busy_tenants_equal_service() -> None:
    toy = Toy(num_blocks=60, num_slots=4, policy=FairShare())
    many = [toy.add(8, 8, tenant="many") for _ in range(40)]
    few = [toy.add(8, 8, tenant="few") for _ in range(10)]
    while any(not request.ended for request in few):
        toy.step()
    assert 5 <= sum(request.ended for request in many) <= 15
    toy.drain()


def test_fair_share_forgets_tenants_that_are_gone() -> None:
    policy = FairShare()
    toy = Toy(num_blocks=60, num_slots=4, policy=policy)
    for index in range(9000):
        toy.add(2, 1, tenant=f"visitor {index}")
        toy.step()
    toy.drain()
    assert len(policy._finish) <= 4096
    assert not policy._running


# ---- several steps at once


def test_decodes_alone_are_planned_several_steps_ahead() -> None:
    toy = Toy(num_blocks=40, num_slots=4, budget=100)
    toy.add(6, 21)
    toy.add(5, 11)
    toy.step()
    plan = toy.scheduler.schedule(max_steps=100)
    assert plan.num_steps == 10, "until the first ends"
    assert plan.starts.tolist() == [6, 5]
    assert toy.tables.lengths[plan.slots].tolist() == [4, 4]


def test_prompts_that_are_faster_whole_are_not_begun_with_the_rest_of_a_step() -> None:
    for prefers, first in ((lambda num_tokens: False, [6, 10]), (lambda num_tokens: num_tokens >= 12, [6])):
        toy = Toy(num_blocks=40, budget=16)
        toy.scheduler._prefers_whole = prefers
        for prompt in ([0, 1, 2] * 2, [3, 4, 1] * 4, [2] * 20):
            toy.add(prompt, 1)
        assert toy.scheduler.schedule().counts.tolist() == first
    # The second fits a step whole; the third fits none, and is begun with what is left.
    assert toy.scheduler.schedule().counts.tolist() == [12, 4]
