"""What the host tier says it has is there once its copies are made."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_backend.kv_cache.host_tier import HostTier

KEYS = [bytes([i]) for i in range(10)]


class Tier(RuleBasedStateMachine):
    """Random calls, beside a memory to which the copies are applied as the device does it: stores, then fetches."""

    @initialize(num_blocks=st.integers(1, 5))
    def make(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.tier = HostTier(num_blocks)
        self.memory: dict[int, bytes] = {}
        self.held: dict[int, list[bytes]] = {}
        """Holders of each host block, by the key they hold it for."""
        self.pinned: list[tuple[int, int, bytes]] = []
        self.planned_stores: list[tuple[int, bytes]] = []
        self.stored = self.fetched = self.fetches = 0

    def store_one(self, key: bytes) -> int:
        """What happens to a block whose device block is `100 + key`."""
        there, full = self.tier.pool.find(key), self.tier.pool.num_free == 0
        host = self.tier.store(100 + key[0], key)
        if there:
            assert host == there, "it is kept once"
        elif full:
            assert host == 0
        else:
            assert 1 <= host <= self.num_blocks
            assert host not in self.held, "somebody else's"
            assert host not in {pinned for pinned, _, _ in self.pinned}, "a fetch would read the wrong content"
            self.planned_stores.append((host, key))
        return host

    @rule(key=st.sampled_from(KEYS))
    def store(self, key: bytes) -> None:
        if host := self.store_one(key):
            self.held.setdefault(host, []).append(key)
            assert self.tier.pool.find(key) == host

    @rule(key=st.sampled_from(KEYS))
    def keep_evicted(self, key: bytes) -> None:
        there, full = self.tier.pool.find(key), self.tier.pool.num_free == 0
        holders = self.tier.pool.holders(there)
        self.tier.keep_evicted(100 + key[0], key)
        host = self.tier.pool.find(key)
        assert bool(host) == bool(there or not full)
        if host and not there:
            assert host not in self.held
            self.planned_stores.append((host, key))
        assert self.tier.pool.holders(host) == holders, "a cache, held by nobody"

    @rule(data=st.data())
    def pin_and_fetch(self, data: st.DataObject) -> None:
        found = [key for key in KEYS if self.tier.pool.find(key)]
        if not found:
            return
        key = data.draw(st.sampled_from(found))
        host = self.tier.pin(key)
        assert host == self.tier.pool.find(key)
        self.fetches += 1
        self.tier.fetch(host, 1000 + self.fetches)
        self.pinned.append((host, 1000 + self.fetches, key))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        host = data.draw(st.sampled_from(sorted(self.held)))
        self.tier.pool.release([host])
        self.held[host].pop()
        if not self.held[host]:
            del self.held[host]

    @rule()
    def take(self) -> None:
        stores, fetches = self.tier.take()
        assert stores == [(100 + key[0], host) for host, key in self.planned_stores]
        assert fetches == [(host, block) for host, block, _ in self.pinned]
        for device, host in stores:
            self.memory[host] = bytes([device - 100])
        for (host, _), (_, _, key) in zip(fetches, self.pinned, strict=True):
            assert self.memory[host] == key, "overwritten before it was fetched"
        self.stored += len(stores)
        self.fetched += len(fetches)
        assert (self.tier.num_stored, self.tier.num_fetched) == (self.stored, self.fetched)
        self.planned_stores, self.pinned = [], []
        for key in KEYS:
            if host := self.tier.pool.find(key):
                assert self.memory[host] == key
        assert self.tier.take() == ([], [])

    @invariant()
    def held_stay(self) -> None:
        if not hasattr(self, "tier"):
            return
        pool = self.tier.pool
        pool.check()
        for host, keys in self.held.items():
            assert {pool.find(key) for key in keys} == {host}
        pins = [host for host, _, _ in self.pinned]
        for host in range(1, self.num_blocks + 1):
            assert pool.holders(host) == len(self.held.get(host, [])) + pins.count(host)


Tier.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestTier = Tier.TestCase


def test_a_pinned_block_outlives_the_pressure_of_its_plan_and_no_longer() -> None:
    tier = HostTier(2)
    for device, key in ((11, b"a"), (12, b"b")):
        tier.keep_evicted(device, key)
    assert tier.take() == ([(11, tier.pool.find(b"a")), (12, tier.pool.find(b"b"))], [])
    host = tier.pin(b"a")
    tier.fetch(host, 21)
    tier.keep_evicted(13, b"c")
    tier.keep_evicted(14, b"d")
    assert tier.pool.find(b"a") == host
    assert tier.pool.find(b"c") == 0, "there was room for one, and the later came last"
    other = tier.pool.find(b"d")
    assert tier.take() == ([(13, other), (14, other)], [(host, 21)])
    assert (tier.num_stored, tier.num_fetched) == (4, 1)
    assert tier.pool.num_free == 2
    tier.keep_evicted(15, b"e")
    assert tier.pool.find(b"d") == 0, "what was fetched was used later"
    tier.keep_evicted(16, b"f")
    assert tier.pool.find(b"a") == 0


def test_a_full_tier_refuses_and_drops_what_is_evicted() -> None:
    tier = HostTier(1)
    host = tier.store(11, b"a")
    assert host == 1
    assert tier.store(12, b"b") == 0
    tier.keep_evicted(12, b"b")
    assert tier.pool.find(b"b") == 0
    assert tier.store(13, b"a") == host, "held by two now"
    tier.pool.release([host])
    assert tier.store(12, b"b") == 0
    tier.pool.release([host])
    assert tier.store(12, b"b") == host
    assert tier.take()[0] == [(11, host), (12, host)]


def test_an_eviction_policy_of_ones_own_decides() -> None:
    class Newest:
        def __init__(self) -> None:
            self.blocks: list[int] = []

        def __len__(self) -> int:
            return len(self.blocks)

        def add(self, block: int) -> None:
            self.blocks.append(block)

        def remove(self, block: int) -> None:
            self.blocks.remove(block)

        def pop(self) -> int:
            return self.blocks.pop()

    tier = HostTier(2, Newest())
    for device, key in ((11, b"a"), (12, b"b"), (13, b"c")):
        tier.keep_evicted(device, key)
    assert [bool(tier.pool.find(key)) for key in (b"a", b"b", b"c")] == [True, False, True]
