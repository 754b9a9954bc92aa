"""Every block is free, cached or used, and found exactly while its content is there."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.eviction import LeastRecentlyUsed

KEYS = [bytes([i]) for i in range(12)]


class Pool(RuleBasedStateMachine):
    """Random calls, beside plain sets and dictionaries of what must be so."""

    @initialize(num_blocks=st.integers(1, 9))
    def make(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.evicted: list[tuple[int, bytes]] = []
        self.pool = BlockPool(num_blocks, on_evict=self.on_evict)
        self.free = set(range(1, num_blocks + 1))
        self.cached: list[int] = []
        self.held: dict[int, int] = {}
        self.retired: list[tuple[int, int]] = []
        self.keys: dict[int, bytes] = {}
        self.tainted: set[int] = set()
        self.to_clear: set[int] = set()
        self.planned = self.ended = 0

    def on_evict(self, block: int, key: bytes) -> None:
        assert self.pool.holders(block) == 0, "not handed out yet"
        assert self.pool.find(key) == 0, "not found any more"
        self.evicted.append((block, key))

    def settle(self, block: int) -> None:
        if block in self.keys:
            self.cached.append(block)
        else:
            self.free.add(block)

    @rule(keys=st.permutations(KEYS), over=st.integers(-1, 1))
    def allocate_what_there_is(self, keys: list[bytes], over: int) -> None:
        self.allocate(max(0, self.pool.num_free + over), keys)

    @rule(keys=st.permutations(KEYS))
    def use_all_once(self, keys: list[bytes]) -> None:
        """So that all is cached, and the next allocation evicts."""
        before = dict(self.held)
        self.allocate(self.pool.num_free, keys)
        self.release_these([block for block in self.held if block not in before][::-1])

    @rule(count=st.integers(0, 5), keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def allocate(self, count: int, keys: list[bytes]) -> None:
        if count > len(self.free) + len(self.cached):
            with pytest.raises(IndexError, match=f"{count} blocks asked, .* of {self.num_blocks} free"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(blocks) == count
        unused = min(count, len(self.free))
        assert set(blocks[:unused]) <= self.free, "what is cached stays as long as there is another"
        assert len(set(blocks[:unused])) == unused
        evicted, self.cached = self.cached[: count - unused], self.cached[count - unused :]
        assert blocks[unused:] == evicted, "the longest unused goes first"
        assert self.evicted == [(block, self.keys.pop(block)) for block in evicted]
        self.evicted.clear()
        self.free.difference_update(blocks)
        self.held |= dict.fromkeys(blocks, 1)
        self.to_clear |= self.tainted.intersection(blocks)
        self.tainted -= set(blocks)
        for block, key in zip(blocks, keys, strict=False):
            self.pool.register(block, key)
            if key not in self.keys.values():
                self.keys[block] = key

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, max_size=6, unique=True))
        self.release_these(blocks)

    def release_these(self, blocks: list[int]) -> None:
        self.pool.release(iter(blocks))
        for block in blocks:
            self.held[block] -= 1
            if not self.held[block]:
                del self.held[block]
                if self.planned > self.ended:
                    self.retired.append((self.planned, block))
                else:
                    self.settle(block)

    @precondition(lambda self: len(self.held) < self.num_blocks)
    @rule(data=st.data())
    def release_twice(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(set(range(1, self.num_blocks + 1)) - set(self.held))))
        with pytest.raises(ValueError, match=f"block {block} released twice"):
            self.pool.release([block])

    @precondition(lambda self: self.held or self.cached or self.retired)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        there = {*self.held, *self.cached, *(block for _, block in self.retired)}
        block = data.draw(st.sampled_from(sorted(there)))
        self.pool.share(block)
        self.held[block] = self.held.get(block, 0) + 1
        self.cached = [other for other in self.cached if other != block]
        self.retired = [(step, other) for step, other in self.retired if other != block]

    @rule()
    def plan_step(self) -> None:
        self.pool.plan_step()
        self.planned += 1

    @precondition(lambda self: self.planned > self.ended)
    @rule()
    def end_step(self) -> None:
        self.pool.end_step()
        self.ended += 1
        for step, block in self.retired:
            if step <= self.ended:
                self.settle(block)
        self.retired = [(step, block) for step, block in self.retired if step > self.ended]

    @precondition(lambda self: self.held.keys() - self.keys.keys())
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def register(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.held.keys() - self.keys.keys())))
        self.pool.register(block, key)
        if key not in self.keys.values() and block not in self.tainted:
            self.keys[block] = key

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def taint(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.held)), max_size=3, unique=True))
        self.pool.taint(blocks)
        for block in blocks:
            self.keys.pop(block, None)
        self.tainted.update(blocks)

    @rule()
    def take_to_clear(self) -> None:
        assert set(self.pool.take_to_clear()) == self.to_clear
        self.to_clear = set()

    @rule(seldom=st.integers(0, 7))
    def reset(self, seldom: int) -> None:
        if seldom != 7:
            return
        self.pool.reset()
        self.keys.clear()
        self.free.update(self.cached)
        self.cached = []

    @invariant()
    def as_modelled(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        pool.check()
        assert pool.num_free == len(self.free) + len(self.cached)
        assert pool.num_cached == len(self.cached)
        assert pool.num_retired == len(self.retired)
        assert pool.num_used == len(self.held) + len(self.retired) == self.num_blocks - pool.num_free
        assert [pool.holders(block) for block in range(self.num_blocks + 1)] == [
            self.held.get(block, 0) for block in range(self.num_blocks + 1)
        ]
        found = {key: block for block, key in self.keys.items()}
        assert [pool.find(key) for key in KEYS] == [found.get(key, 0) for key in KEYS]


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = Pool.TestCase


def test_block_zero_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(5)) == [1, 2, 3, 4, 5]
    assert pool.find(b"nothing") == 0
    assert pool.holders(0) == 0


def test_too_many_blocks_are_refused_with_the_numbers_and_nothing_is_evicted() -> None:
    pool = BlockPool(3, on_evict=lambda block, key: pytest.fail("evicted"))
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"a")
    pool.release(blocks)
    with pytest.raises(IndexError, match="4 blocks asked, 3 of 3 free"):
        pool.allocate(4)
    assert pool.num_free == 3
    assert pool.find(b"a") == blocks[0]


def test_the_order_of_release_is_the_order_of_eviction() -> None:
    evicted = []
    pool = BlockPool(6, on_evict=lambda block, key: evicted.append((block, key)))
    first, second = pool.allocate(3), pool.allocate(3)
    for at, block in enumerate(first + second):
        pool.register(block, KEYS[at])
    pool.release(reversed(second))
    pool.release(reversed(first))
    pool.share(second[2])
    pool.release([second[2]])
    order = [second[1], second[0], first[2], first[1], first[0], second[2]]
    assert pool.allocate(6) == order, "the tail of the oldest prefix first; what is used again goes last"
    assert evicted == [(block, KEYS[(first + second).index(block)]) for block in order]


def test_a_block_a_step_may_write_to_is_found_and_shared_but_not_handed_out_until_it_ends() -> None:
    pool = BlockPool(2)
    kept, shared = pool.allocate(2)
    pool.register(kept, b"kept")
    pool.register(shared, b"shared")
    pool.plan_step()
    pool.release([kept, shared])
    pool.plan_step()
    assert (pool.num_free, pool.num_cached, pool.num_used, pool.num_retired) == (0, 0, 2, 2)
    with pytest.raises(IndexError):
        pool.allocate(1)
    assert pool.find(b"shared") == shared
    pool.share(shared)
    pool.end_step()
    assert (pool.num_free, pool.num_cached, pool.num_used, pool.num_retired) == (1, 1, 1, 0)
    pool.release([shared])
    assert pool.num_retired == 1, "the second step may write to it"
    assert pool.allocate(1) == [kept]
    pool.end_step()
    assert pool.allocate(1) == [shared]


def test_what_is_released_between_steps_is_free_at_once_and_after_a_plan_only_when_that_ends() -> None:
    pool = BlockPool(3)
    a, b, c = pool.allocate(3)
    pool.release([a])
    assert pool.num_free == 1
    pool.plan_step()
    pool.release([b])
    pool.plan_step()
    pool.release([c])
    frees = []
    for _ in range(2):
        frees.append(pool.num_free)
        pool.end_step()
    assert [*frees, pool.num_free] == [1, 2, 3]


def test_a_duplicate_keeps_the_first() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"a")
    pool.register(second, b"a")
    assert pool.find(b"a") == first
    pool.release([second])
    assert pool.num_cached == 0, "the copy is of no use"
    pool.release([first])
    assert (pool.find(b"a"), pool.num_cached, pool.num_free) == (first, 1, 2)


def test_tainted_blocks_are_not_found_and_cleared_exactly_when_handed_out_again() -> None:
    pool = BlockPool(4)
    good, bad, late = pool.allocate(3)
    for block, key in ((good, b"good"), (bad, b"bad")):
        pool.register(block, key)
    pool.share(bad)
    pool.taint([bad, late])
    pool.register(late, b"late")
    assert [pool.find(key) for key in (b"good", b"bad", b"late")] == [good, 0, 0]
    assert pool.take_to_clear() == [], "they are held, and read, still"
    pool.release([bad, late])
    assert pool.num_used == 2, "another holds the bad one"
    assert late in pool.allocate(2)
    assert pool.take_to_clear() == [late]
    assert pool.take_to_clear() == [], "once"
    pool.register(late, b"late")
    assert pool.find(b"late") == late, "clean again"
    pool.release([bad])
    assert pool.num_cached == 0
    assert pool.allocate(1) == [bad]
    assert pool.take_to_clear() == [bad]


def test_reset_forgets_held_retired_and_cached_content() -> None:
    evicted = []
    pool = BlockPool(3, on_evict=lambda block, key: evicted.append(block))
    held, retired, cached = pool.allocate(3)
    for block, key in ((held, b"h"), (retired, b"r"), (cached, b"c")):
        pool.register(block, key)
    pool.release([cached])
    pool.plan_step()
    pool.release([retired])
    pool.reset()
    assert [pool.find(key) for key in (b"h", b"r", b"c")] == [0, 0, 0]
    assert (pool.num_free, pool.num_cached, pool.num_used) == (1, 0, 2)
    pool.end_step()
    pool.release([held])
    assert (pool.num_free, pool.num_cached) == (3, 0)
    pool.allocate(3)
    assert evicted == []
    pool.register(held, b"c")
    assert pool.find(b"c") == held


class MostRecentlyUsed:
    """The other way round, and watched."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def add(self, block: int) -> None:
        assert block not in self.blocks
        self.blocks.append(block)

    def remove(self, block: int) -> None:
        self.blocks.remove(block)

    def pop(self) -> int:
        return self.blocks.pop()


def test_an_eviction_policy_of_ones_own_decides() -> None:
    policy = MostRecentlyUsed()
    pool = BlockPool(4, eviction=policy)
    blocks = pool.allocate(4)
    for key, block in zip(KEYS, blocks, strict=False):
        pool.register(block, key)
    pool.release(blocks)
    assert policy.blocks == blocks
    pool.share(blocks[1])
    assert policy.blocks == [blocks[0], blocks[2], blocks[3]], "what is held is out of its hands"
    assert pool.allocate(2) == [blocks[3], blocks[2]]
    assert pool.num_cached == 1
    pool.reset()
    assert policy.blocks == []


def test_least_recently_used() -> None:
    policy = LeastRecentlyUsed()
    for block in (3, 1, 2, 4):
        policy.add(block)
    policy.remove(1)
    policy.remove(3)
    policy.add(3)
    assert [policy.pop() for _ in range(len(policy))] == [2, 4, 3]
    assert len(policy) == 0
    with pytest.raises(KeyError):
        policy.remove(2)
